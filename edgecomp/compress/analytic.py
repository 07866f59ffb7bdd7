"""Bias correction from the mean of each input channel, in one float pass: cheap, for plain rounding.

The rounded weights add (W_rounded - W) E[x] to the mean of a layer's output; the bias takes it back (Nagel
et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2).
E[x] is measured on calibration samples, one number for each channel: the border of a padded convolution is
neglected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgecomp.compress import biases, scales
from edgecomp.compress.columns import groups_of, supported
from edgecomp.graph import constants
from edgecomp.graph.interpret import watch
from edgecomp.numerics import affine
from edgecomp.spec import TensorQuantization


def correct_biases(
    graph_module: GraphModule,
    weights: Mapping[str, TensorQuantization],
    batches: Iterable[Sequence[Tensor]],
    floats: Mapping[str, str],
) -> int:
    """Write mended biases into the graph; returns how many layers got one. Layers in `floats` are left."""
    layers = [
        layer
        for name, users in scales.weight_nodes(graph_module).items()
        for layer in users
        if name in weights and layer.name not in floats and _has_bias(layer)
    ]
    means = channel_means(graph_module, batches, layers)
    mended: dict[str, Tensor] = {}
    for layer in layers:
        q = weights[str(layer.args[1].target)]
        weight = constants.value_of(graph_module, layer.args[1])
        drift = torch.from_numpy(affine.dequantize(q.values, q)) - weight  # type: ignore[arg-type]
        bias = constants.value_of(graph_module, layer.args[2])
        mended[layer.name] = bias - added(drift, means[layer.name], layer)
    biases.write(graph_module, mended)
    return len(layers)


def _has_bias(layer: Node) -> bool:
    return supported(layer) and len(layer.args) > 2 and constants.is_constant(layer.args[2])


def added(drift: Tensor, mean: Tensor, layer: Node) -> Tensor:
    """What a change of the weight [out, in / groups, ...] adds to each output's mean, mean [in] given."""
    each = drift.flatten(2).sum(2) if drift.dim() > 2 else drift
    groups = groups_of(layer)
    return (each * mean.reshape(groups, -1).repeat_interleave(len(drift) // groups, 0)).sum(1)


def channel_means(
    graph_module: GraphModule, batches: Iterable[Sequence[Tensor]], layers: Sequence[Node]
) -> dict[str, Tensor]:
    """Layer name -> mean of each channel of its input [channels], float pass."""
    sums: dict[str, Tensor] = {}
    readers: dict[str, list[Node]] = {}
    for layer in layers:
        readers.setdefault(layer.args[0].name, []).append(layer)
    count = 0

    def visit(node: Node, value: Tensor) -> None:
        for layer in readers[node.name]:
            rows = layer.target is torch.ops.aten.linear.default
            flat = value.reshape(-1, value.shape[-1]) if rows else value.transpose(0, 1).flatten(1).T
            sums[layer.name] = sums.get(layer.name, torch.zeros(flat.shape[1])) + flat.mean(0)

    for inputs in batches:
        watch(graph_module, inputs, visit, frozenset(readers))
        count += 1
    return {n.name: sums[n.name] / max(count, 1) for n in layers}
