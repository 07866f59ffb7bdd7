"""Weights rounded with their inputs in view, layer by layer, each after everything before it.

For every convolution and linear layer: scales by the error on its inputs as they are after quantization,
rounding (GPTQ, or to nearest), and a bias that restores the mean output of the float layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgecomp.compress import biases, columns, plan, scales, stream
from edgecomp.graph import constants
from edgecomp.numerics import affine, gptq
from edgecomp.spec import QuantizationPlan, QuantSpec, TensorQuantization

Rounding = Literal["nearest", "sequential-mse", "gptq", "descent"]
Correction = Literal["auto", "none", "analytic", "empirical", "checked"]

_GRID = tuple(float(share) for share in np.linspace(0.6, 1.0, 17))
_FEW_WEIGHTS = 25
"""Up to that many weights for each output, a scale is worth choosing by where it puts its grid."""
_CLIP_SHARES = {8: (1.0,), 4: _GRID}


@dataclass(frozen=True)
class Method:
    """How integers and biases are found.

    `rounding`: "gptq"; "descent" (GPTQ, then column by column to the best integer given all others, until
    none changes; `gptq.descend`); "sequential-mse" (nearest, on the scale of a grid with the least error on
    the layer's inputs, layer after layer); "nearest" (min-max scales). `correction` of the bias: "empirical"
    restores the mean of the float layer's output on the inputs as they are after quantization, "analytic"
    takes back what the rounded weights add to it on float inputs, (W_rounded - W) E[x] (Nagel et al., ICCV
    2019, section 4.2; E[x] is measured here, not derived from batch-norm statistics), "none" leaves it;
    "checked" tries the empirical and the analytic biases on samples that were not rounded by (`biases`).
    """

    rounding: Rounding = "gptq"
    correction: Correction = "empirical"


@dataclass
class Sums:
    """What the rounding of one layer needs of its inputs, averaged over samples and positions.

    `hessian` [groups, d, d] is empty where it was not asked for; means of each sample [samples, groups, d].
    """

    hessian: np.ndarray
    means: np.ndarray
    float_means: np.ndarray


def sums(layer: stream.Layer, second: bool = True) -> Sums:
    """Second moments and mean of the quantized inputs, and the mean of the float ones."""
    moments: Tensor | float = 0.0
    means: list[tuple[Tensor, Tensor]] = []
    count = 0
    for quantized, exact in zip(layer.inputs, layer.float_inputs, strict=True):
        q, x = columns.columns(quantized, layer.node), columns.columns(exact, layer.node)
        moments = moments + (q @ q.transpose(1, 2) if second else q.new_empty(0))
        means.append((q.mean(2), x.mean(2)))
        count += q.shape[2]
    hessian = (moments / count).double().numpy() if isinstance(moments, Tensor) else np.empty(0)
    of_q, of_x = (torch.stack(side).double().numpy() for side in zip(*means, strict=True))
    return Sums(hessian, of_q, of_x)


@dataclass
class Rounder:
    """Decides each layer's integers and bias as the stream reaches it."""

    graph_module: GraphModule
    activations: Mapping[str, TensorQuantization]
    floats: Mapping[str, str]
    bits: int
    method: Method = Method()
    bits_of: Mapping[str, int] = field(default_factory=dict)
    rounding_of: Mapping[str, Rounding] = field(default_factory=dict)
    weights: dict[str, TensorQuantization] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    analytic: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, layer: stream.Layer) -> tuple[Tensor, Tensor | None]:
        node = layer.node
        name = str(node.args[1].target)
        known = self._already(name)
        if known is not None:
            return known, None
        weight = constants.value_of(self.graph_module, node.args[1]).numpy()
        if node.name in self.floats:
            return torch.from_numpy(weight), None
        spec = plan.weight_spec(node, self.bits_of.get(name, self.bits))
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
        how = self._rounding(name)
        node, found = layer.node, sums(layer, how != "nearest")
        trained = columns.as_matrices(weight.astype(np.float64), node)
        scale = self._scales(node, name, trained, found.hessian, spec)
        if how in ("gptq", "descent"):
            integers = gptq.round_weights(trained, found.hessian, scale, spec.qmax)
            if how == "descent":
                integers = gptq.descend(trained, integers, found.hessian, scale, spec.qmax)
        else:
            integers = gptq.nearest(trained, scale, spec.qmax)
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

    def _rounding(self, name: str) -> Rounding:
        return self.rounding_of.get(name, self.method.rounding)

    def _scales(
        self, node: Node, name: str, trained: np.ndarray, hessian: np.ndarray, spec: QuantSpec
    ) -> np.ndarray:
        how = self._rounding(name)
        shares = _GRID if how == "sequential-mse" else _CLIP_SHARES.get(spec.bits, (1.0,))
        if how == "nearest":
            scale = np.maximum(np.abs(trained).max(axis=2) / spec.qmax, affine.SMALLEST_SCALE)
        else:
            scale = gptq.clipped_scales(trained, hessian, spec.qmax, shares)
        if how in ("gptq", "descent") and trained.shape[2] <= _FEW_WEIGHTS:
            scale = gptq.aligned_scales(trained, hessian, scale, spec.qmax)
        users = scales.weight_nodes(self.graph_module)[name]
        floored = plan.weight_scale(
            self.graph_module, users, self.activations, scale.reshape(-1).astype(np.float32)
        )
        return floored.reshape(scale.shape)

    def _bias(self, node: Node, found: Sums, trained: np.ndarray, rounded: np.ndarray) -> Tensor | None:
        """b + mean(W x_float) - mean(W_rounded x), per output; x quantized, or float if analytic."""
        bias = plan.bias_of(self.graph_module, node)
        if bias is None or not isinstance(node.args[2], Node) or self.method.correction == "none":
            return None
        exact = np.einsum("god,sgd->sgo", trained, found.float_means)

        def mended(seen: np.ndarray) -> Tensor:
            drifts = exact - np.einsum("god,sgd->sgo", rounded, seen)
            drift = agreed(drifts.reshape(len(drifts), -1))
            return torch.from_numpy((bias + drift).astype(np.float32))

        analytic = self.method.correction == "analytic"
        self.biases[node.name] = mended(found.float_means if analytic else found.means)
        if self.method.correction == "checked":
            self.analytic[node.name] = mended(found.float_means)
        return self.biases[node.name]


def agreed(drifts: np.ndarray) -> np.ndarray:
    """Mean over samples [samples, out] -> [out], made smaller where the samples do not agree on it.

    Positive part of James and Stein's estimator (1961), channel by channel: m max(0, 1 - s^2 / (n m^2)).
    A few clipped samples would otherwise move the bias of all.
    """
    mean = drifts.mean(0)
    if len(drifts) < 2:
        return mean
    doubt = drifts.var(0, ddof=1) / len(drifts)
    return mean * np.clip(1 - doubt / np.maximum(mean**2, 1e-300), 0, 1)


def _restored(q: TensorQuantization) -> Tensor:
    return torch.from_numpy(affine.dequantize(q.values, q))  # type: ignore[arg-type]


def round_by_inputs(
    graph_module: GraphModule,
    samples: Sequence[tuple[Tensor, ...]],
    activations: Mapping[str, TensorQuantization],
    floats: Mapping[str, str],
    bits: int,
    method: Method | None = None,
    bits_of: Mapping[str, int] | None = None,
    unseen: Sequence[tuple[Tensor, ...]] = (),
    rounding_of: Mapping[str, Rounding] | None = None,
) -> dict[str, TensorQuantization]:
    """Round all weights but those of layers in `floats`; mended biases are written into the graph given.

    `bits_of`, `rounding_of`: weight name -> what differs from `bits` and `method`. `unseen`: other samples,
    for a correction that is checked; without them it is empirical.
    """
    rounder = Rounder(
        graph_module, activations, floats, bits, method or Method(), bits_of or {}, rounding_of or {}
    )
    stream.run(graph_module, samples, dict(activations), rounder)
    chosen: biases.Biases = rounder.biases
    if rounder.analytic and unseen:
        decided = QuantizationPlan(activations, rounder.weights, floats)
        chosen = biases.quieter(graph_module, decided, (rounder.biases, rounder.analytic), unseen)
    biases.write(graph_module, chosen)
    return rounder.weights
