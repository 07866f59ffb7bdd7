"""From observed ranges to a `QuantizationPlan`: every scale, zero point and weight integer, decided once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch.fx import GraphModule, Node

from edgecomp.compress import scales
from edgecomp.graph import constants
from edgecomp.graph.vocabulary import FIXED_8, FIXED_16, WEIGHTED
from edgecomp.numerics import affine
from edgecomp.spec import QuantizationPlan, QuantSpec, TensorQuantization

Ranges = Mapping[str, tuple[float, float]]


def activation_spec(bits: int) -> QuantSpec:
    """8 bits asymmetric; 16 bits symmetric, as TFLite's 16x8 kernels want them."""
    return QuantSpec(bits=bits, symmetric=bits == 16, narrow=bits == 16)


def activations(
    groups: scales.ScaleGroups,
    ranges: Ranges,
    spec: QuantSpec,
    other: Mapping[str, TensorQuantization] | None = None,
) -> dict[str, TensorQuantization]:
    """Quantization of every scaled node: the union of its group's ranges, or the prescribed scale.

    `other`: root of a group -> its quantization, decided elsewhere (`with_bits`).
    """
    decided: dict[str, TensorQuantization] = {}
    for root, members in groups.members().items():
        if other and root in other:
            quantization = other[root]
        elif root in groups.prescribed:
            quantization = affine.fixed(*groups.prescribed[root], spec)
        else:
            quantization = affine.from_range(*union(ranges, members), spec)
        decided.update(dict.fromkeys(members, quantization))
    return decided


def union(ranges: Ranges, members: Sequence[str]) -> tuple[float, float]:
    return min(ranges[m][0] for m in members), max(ranges[m][1] for m in members)


def with_bits(
    graph_module: GraphModule, groups: scales.ScaleGroups, ranges: Ranges, bits: Mapping[str, int]
) -> dict[str, TensorQuantization]:
    """Root of a group -> its quantization in the bits given; what a function prescribes where it does.

    `log_softmax` has no prescribed scale and no kernel in 16 bits: it keeps its 8.
    """
    found: dict[str, TensorQuantization] = {}
    targets = {n.name: n.target for n in graph_module.graph.nodes}
    members = groups.members()
    for root, width in bits.items():
        prescribed = (FIXED_8 if width == 8 else FIXED_16).get(targets[root])
        if prescribed is not None:
            found[root] = affine.fixed(*prescribed, activation_spec(width))
        elif root not in groups.prescribed:
            found[root] = affine.from_range(*union(ranges, members[root]), activation_spec(width))
    return found


def bias_of(graph_module: GraphModule, layer: Node) -> np.ndarray | None:
    """The bias of a weighted layer as an array, or None."""
    node = layer.args[2] if len(layer.args) > 2 else None
    return constants.value_of(graph_module, node).numpy() if isinstance(node, Node) else None


def weight_scale(
    graph_module: GraphModule,
    layers: list[Node],
    decided: Mapping[str, TensorQuantization],
    scale: np.ndarray,
) -> np.ndarray:
    """Raise the scales of near-dead channels where a layer's bias would overflow int32."""
    for layer in layers:
        bias, source = bias_of(graph_module, layer), decided.get(layer.args[0].name)
        if bias is not None and source is not None and bias.size == scale.size:
            scale = affine.floor_for_bias(scale, bias.reshape(scale.shape), source.scale)
    return scale


def weight_spec(layer: Node, bits: int) -> QuantSpec:
    """Symmetric narrow, per output channel; a grouped transposed convolution shares its channel axis."""
    axis: int | None = WEIGHTED[layer.target]
    if axis == 1 and len(layer.args) > 6 and layer.args[6] != 1:
        axis = None
    return QuantSpec(bits=bits, symmetric=True, axis=axis, narrow=True)


def weights(
    graph_module: GraphModule,
    decided: Mapping[str, TensorQuantization],
    bits: Mapping[str, int],
    default: int,
) -> dict[str, TensorQuantization]:
    """Round every weight to nearest on min-max scales per channel."""
    result = {}
    for name, layers in scales.weight_nodes(graph_module).items():
        values = constants.value_of(graph_module, layers[0].args[1]).numpy()
        spec = weight_spec(layers[0], bits.get(name, default))
        scale = weight_scale(graph_module, layers, decided, affine.channel_scales(values, spec))
        result[name] = round_to(values, spec, scale)
    return result


def round_to(values: np.ndarray, spec: QuantSpec, scale: np.ndarray) -> TensorQuantization:
    """A weight rounded to nearest on the given scales, integers included (int8, or int16 above 8 bits)."""
    quantization = TensorQuantization(spec, scale, np.zeros(scale.shape, np.int32))
    integers = affine.quantize(values, quantization)
    return replace(quantization, values=integers.astype(np.int8 if spec.bits <= 8 else np.int16))


def assemble(
    graph_module: GraphModule,
    decided: Mapping[str, TensorQuantization],
    weight_plan: Mapping[str, TensorQuantization],
    excluded: Mapping[str, str],
) -> QuantizationPlan:
    """Drop what stays float: weights of float layers, and scales that no integer operation reads or gives."""
    float_nodes = {**scales.without_kernel(graph_module), **_computed_weights(graph_module), **excluded}
    used = {
        str(n.args[1].target)
        for n in graph_module.graph.nodes
        if n.target in WEIGHTED and n.name not in float_nodes and constants.is_constant(n.args[1])
    }
    nodes = {n.name: n for n in graph_module.graph.nodes}
    kept = {n: q for n, q in decided.items() if _touches_integers(nodes[n], float_nodes)}
    return QuantizationPlan(kept, {n: q for n, q in weight_plan.items() if n in used}, float_nodes)


def _computed_weights(graph_module: GraphModule) -> dict[str, str]:
    """Weighted layers whose weight is computed, not stored: nothing to quantize ahead of time."""
    return {
        n.name: "its weight is computed at run time"
        for n in graph_module.graph.nodes
        if n.target in WEIGHTED and not constants.is_constant(n.args[1])
    }


def _touches_integers(node: Node, float_nodes: Mapping[str, str]) -> bool:
    neighbours = [node, *node.users] if node.op == "call_function" else list(node.users)
    return any(n.op == "call_function" and n.name not in float_nodes for n in neighbours)
