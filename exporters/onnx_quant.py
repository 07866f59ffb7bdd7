"""QDQ form: where the plan has a scale, a QuantizeLinear and DequantizeLinear pair stands in the graph.

Weights are stored as int8 and biases as int32 initializers behind a DequantizeLinear, as ONNX Runtime's
and TensorRT's integer kernels want them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch.fx import Node

from edgecomp.exporters.onnx_graph import Builder
from edgecomp.graph.vocabulary import WEIGHTED
from edgecomp.numerics import affine
from edgecomp.spec import QuantizationPlan, TensorQuantization

_LARGEST_BIAS = 2**31 - 1
_WIDTH = {4: np.int8, 8: np.int8, 16: np.int16}


def zero_point(b: Builder, q: TensorQuantization, name: str) -> str:
    return b.constant(q.zero_point, _WIDTH[q.spec.bits], f"{name}_zero_point")


def round_value(b: Builder, value: str, name: str, q: TensorQuantization) -> str:
    """value -> QuantizeLinear -> DequantizeLinear, whose output carries the graph node's name."""
    scale = b.constant(q.scale, np.float32, f"{name}_scale")
    zero = zero_point(b, q, name)
    stored = b.op("QuantizeLinear", [value, scale, zero], name=f"{name}_quantized")
    return b.op("DequantizeLinear", [stored, scale, zero], name=name)


def stored_constant(b: Builder, value: np.ndarray, name: str, q: TensorQuantization) -> str:
    """A constant operand, kept as integers."""
    integers = b.constant(affine.quantize(value, q), _WIDTH[q.spec.bits], f"{name}_quantized")
    scale = b.constant(q.scale, np.float32, f"{name}_scale")
    return b.op("DequantizeLinear", [integers, scale, zero_point(b, q, name)], name=name)


def stored_weight(b: Builder, name: str, q: TensorQuantization, turned: bool) -> str:
    """An int8 weight behind DequantizeLinear along its channel axis; `turned`: [in, out] for MatMul."""
    if q.values is None:
        raise ValueError(f"weight {name!r} has scales but no integers; plans carry both")
    values, axis = (q.values.T, 1) if turned else (q.values, q.spec.axis)
    suffix = "_turned" if turned else ""
    integers = b.constant(values, _WIDTH[q.spec.bits], f"{name}_quantized{suffix}")
    scale = b.constant(q.scale, np.float32, f"{name}_scale")
    zeros = zero_point(b, q, name)
    if q.spec.axis is None:
        axis = None
    return b.op("DequantizeLinear", [integers, scale, zeros], axis=axis)


def stored_bias(
    b: Builder, bias: np.ndarray, layer: Node, source: TensorQuantization, weight: TensorQuantization
) -> str:
    """An int32 bias behind DequantizeLinear with scale input * weight.

    On the scale of a 16-bit input it may need more than int32: it is then float, rounded as if it fitted.
    """
    integers = affine.quantize_bias(bias, source.scale, weight.scale)
    scales = affine.bias_scales(source.scale, weight.scale)
    if np.abs(integers).max(initial=0) > _LARGEST_BIAS:
        return b.constant(integers * scales.astype(np.float64), np.float32, f"{layer.name}_bias_rounded")
    stored = b.constant(integers, np.int32, f"{layer.name}_bias_quantized")
    scale = b.constant(scales, np.float32, f"{layer.name}_bias_scale")
    return b.op("DequantizeLinear", [stored, scale], axis=0 if scales.ndim else None)


def is_integer_layer(plan: QuantizationPlan, node: Node) -> bool:
    """A weighted layer whose weight the plan has and whose input arrives as integers."""
    if node.target not in WEIGHTED or node.name in plan.float_nodes:
        return False
    weight, source = node.args[1], node.args[0]
    return weight.op == "get_attr" and str(weight.target) in plan.weights and source.name in plan.activations


def layer_operands(
    b: Builder,
    node: Node,
    plan: QuantizationPlan,
    constant: Callable[[Node], np.ndarray],
    float_bias: bool = False,
) -> dict[str, str]:
    """Names that a quantized layer's weight and bias take for the lowering of this one layer."""
    weight_node = node.args[1]
    weight, source = plan.weights[str(weight_node.target)], plan.activations[node.args[0].name]
    turned = str(node.target).startswith("aten.linear") and node.args[0].meta["val"].dim() != 2
    names = {weight_node.name: stored_weight(b, str(weight_node.target), weight, turned)}
    bias = node.args[2] if len(node.args) > 2 else None
    if isinstance(bias, Node) and not float_bias:
        names[bias.name] = stored_bias(b, constant(bias), node, source, weight)
    return names
