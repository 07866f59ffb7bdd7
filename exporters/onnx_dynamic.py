"""Dynamic quantization: int8 weights in the file, activations quantized when the model runs.

Linear layers become DynamicQuantizeLinear (uint8, per tensor) and MatMulInteger, the form that ONNX Runtime
fuses; convolutions keep float arithmetic on int8 weights, since ONNX Runtime's integer convolution with
dynamic scales is slower than its float one. No calibration data is needed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.fx import GraphModule, Node

from edgecomp.exporters import onnx_quant
from edgecomp.exporters.onnx_graph import Builder
from edgecomp.graph import constants
from edgecomp.graph.vocabulary import WEIGHTED
from edgecomp.numerics import affine
from edgecomp.spec import QuantSpec, TensorQuantization

aten = torch.ops.aten


def is_stored(node: Node) -> bool:
    """A weighted layer whose weight is in the file."""
    return node.target in WEIGHTED and constants.is_constant(node.args[1])


def stored_weights(graph_module: GraphModule) -> dict[str, TensorQuantization]:
    """Every stored weight rounded to nearest, int8 symmetric per output channel."""
    found: dict[str, TensorQuantization] = {}
    for node in graph_module.graph.nodes:
        if is_stored(node) and str(node.args[1].target) not in found:
            value = constants.value_of(graph_module, node.args[1]).detach().numpy()
            found[str(node.args[1].target)] = _rounded(value, node)
    return found


def _rounded(value: np.ndarray, node: Node) -> TensorQuantization:
    axis: int | None = WEIGHTED[node.target]
    if axis == 1 and len(node.args) > 6 and node.args[6] != 1:
        axis = None  # a grouped transposed convolution shares its channel axis
    spec = QuantSpec(bits=8, symmetric=True, axis=axis, narrow=True)
    scale = affine.channel_scales(value, spec)
    zeros = np.zeros(scale.shape, np.int32)
    integers = affine.quantize(value, TensorQuantization(spec, scale, zeros))
    return TensorQuantization(spec, scale, zeros, integers.astype(np.int8))


def linear(b: Builder, node: Node, weight: TensorQuantization, bias: str | None) -> str:
    """x -> uint8 at run time -> MatMulInteger with the int8 weight -> float, times both scales, plus bias."""
    name = str(node.args[1].target)
    if weight.values is None:
        raise ValueError(f"weight {name!r} has no integers")
    stored, scale, zero = b.ops("DynamicQuantizeLinear", [b.take(node.args[0])], 3)
    integers = b.constant(weight.values.T, np.int8, f"{name}_quantized_turned")
    product = b.op("Cast", [b.op("MatMulInteger", [stored, integers, zero])], to=1)
    scales = b.op("Mul", [scale, b.constant(weight.scale, np.float32, f"{name}_scale")])
    result = b.op("Mul", [product, scales])
    return result if bias is None else b.op("Add", [result, bias])


def float_layer_weight(b: Builder, node: Node, weight: TensorQuantization) -> str:
    """The int8 weight of a convolution behind DequantizeLinear."""
    return onnx_quant.stored_weight(b, str(node.args[1].target), weight, turned=False)
