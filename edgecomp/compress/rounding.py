"""Weights rounded with their inputs in view, layer by layer, each after everything before it.

For every convolution and linear layer: scales by the error on its inputs as they are after quantization,
GPTQ rounding, and a bias that restores the mean output of the float layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgecomp.compress import columns, plan, scales, stream
from edgecomp.graph import constants
from edgecomp.numerics import affine, gptq
from edgecomp.spec import QuantSpec, TensorQuantization

_CLIP_SHARES = {8: (1.0,), 4: tuple(np.linspace(0.6, 1.0, 17))}


@dataclass
class Sums:
    """What the rounding of one layer needs of its inputs, averaged over samples and positions."""

    hessian: np.ndarray
    mean: np.ndarray
    float_mean: np.ndarray


def sums(layer: stream.Layer) -> Sums:
    """Second moments and mean of the quantized inputs, and the mean of the float ones."""
    totals: list[Tensor] = []
    count = 0
    for quantized, exact in zip(layer.inputs, layer.float_inputs, strict=True):
        q, x = columns.columns(quantized, layer.node), columns.columns(exact, layer.node)
        parts = [q @ q.transpose(1, 2), q.sum(2), x.sum(2)]
        totals = [whole + part for whole, part in zip(totals, parts, strict=True)] if totals else parts
        count += q.shape[2]
    hessian, mean, float_mean = (t.double().numpy() / count for t in totals)
    return Sums(hessian, mean, float_mean)


@dataclass
class Rounder:
    """Decides each layer's integers and bias as the stream reaches it."""

    graph_module: GraphModule
    activations: Mapping[str, TensorQuantization]
    floats: Mapping[str, str]
    bits: int
    weights: dict[str, TensorQuantization] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, layer: stream.Layer) -> tuple[Tensor, Tensor | None]:
        node = layer.node
        name = str(node.args[1].target)
        known = self._already(name)
        if known is not None:
            return known, None
        weight = constants.value_of(self.graph_module, node.args[1]).numpy()
        if node.name in self.floats:
            return torch.from_numpy(weight), None
        spec = plan.weight_spec(node, self.bits)
        if not columns.supported(node) or node.args[0].name not in self.activations:
            return self._plain(name, node, weight, spec), None
        return self._by_inputs(name, layer, weight, spec)

    def _already(self, name: str) -> Tensor | None:
        """A weight that several layers share (a recurrent one) is rounded at its first use."""
        found = self.weights.get(name)
        return None if found is None or found.values is None else _restored(found)

    def _plain(self, name: str, node: Node, weight: np.ndarray, spec: QuantSpec) -> Tensor:
        users = scales.weight_nodes(self.graph_module)[name]
        scale = plan.weight_scale(
            self.graph_module, users, self.activations, affine.channel_scales(weight, spec)
        )
        self.weights[name] = plan.round_to(weight, spec, scale)
        return _restored(self.weights[name])

    def _by_inputs(
        self, name: str, layer: stream.Layer, weight: np.ndarray, spec: QuantSpec
    ) -> tuple[Tensor, Tensor | None]:
        node, found = layer.node, sums(layer)
        trained = columns.as_matrices(weight.astype(np.float64), node)
        scale = self._scales(node, name, trained, found.hessian, spec)
        integers = gptq.round_weights(trained, found.hessian, scale, spec.qmax)
        per_channel = scale.reshape(-1).astype(np.float32)
        self.weights[name] = TensorQuantization(
            spec,
            per_channel,
            np.zeros(per_channel.shape, np.int32),
            integers.reshape(weight.shape).astype(np.int8),
        )
        restored = _restored(self.weights[name])
        return restored, self._bias(
            node, found, trained, columns.as_matrices(restored.double().numpy(), node)
        )

    def _scales(
        self, node: Node, name: str, trained: np.ndarray, hessian: np.ndarray, spec: QuantSpec
    ) -> np.ndarray:
        scale = gptq.clipped_scales(trained, hessian, spec.qmax, _CLIP_SHARES.get(spec.bits, (1.0,)))
        users = scales.weight_nodes(self.graph_module)[name]
        floored = plan.weight_scale(
            self.graph_module, users, self.activations, scale.reshape(-1).astype(np.float32)
        )
        return floored.reshape(scale.shape)

    def _bias(self, node: Node, found: Sums, trained: np.ndarray, rounded: np.ndarray) -> Tensor | None:
        """b + mean(W x_float) - mean(W_rounded x_quantized), per output; source: Nagel et al., ICCV 2019."""
        bias = plan.bias_of(self.graph_module, node)
        if bias is None or not isinstance(node.args[2], Node):
            return None
        drift = np.einsum("god,gd->go", trained, found.float_mean) - np.einsum(
            "god,gd->go", rounded, found.mean
        )
        mended = torch.from_numpy((bias + drift.reshape(-1)).astype(np.float32))
        self.biases[node.name] = mended
        return mended


def _restored(q: TensorQuantization) -> Tensor:
    return torch.from_numpy(affine.dequantize(q.values, q))  # type: ignore[arg-type]


def round_by_inputs(
    graph_module: GraphModule,
    samples: Sequence[tuple[Tensor, ...]],
    activations: Mapping[str, TensorQuantization],
    floats: Mapping[str, str],
    bits: int,
) -> dict[str, TensorQuantization]:
    """Round all weights but those of layers in `floats`; mended biases are written into the graph given."""
    rounder = Rounder(graph_module, activations, floats, bits)
    stream.run(graph_module, samples, dict(activations), rounder)
    for name, bias in rounder.biases.items():
        layer = next(n for n in graph_module.graph.nodes if n.name == name)
        layer.update_arg(2, constants.add(graph_module, f"{name}_mended_bias", bias, layer))
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return rounder.weights
