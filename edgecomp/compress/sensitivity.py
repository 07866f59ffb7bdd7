"""What each rounding costs at the outputs: one weight or one scale group of activations at a time.

All else stays float. The graph is run once for each sample and its values are kept; for each rounding only
what depends on it is computed again. Noises of different roundings are nearly independent, so their powers
add up: the sum over a plan predicts the noise of the plan, and taking away the largest pays most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from edgecomp.compress import scales
from edgecomp.graph import constants
from edgecomp.numerics import affine
from edgecomp.spec import QuantizationPlan, TensorQuantization


@dataclass(frozen=True)
class Sensitivity:
    """`nodes`: graph nodes that share the scale, or layers that use the weight `name`. `noise`: power of the
    outputs' error over the outputs' own power. `elements`: values rounded for one sample."""

    kind: Literal["activation", "weight"]
    name: str
    module: str
    nodes: tuple[str, ...]
    bits: int
    elements: int
    noise: float

    @property
    def sqnr_db(self) -> float:
        return decibels(self.noise)


def decibels(noise: float) -> float:
    """SQNR of a noise that is relative to the signal's power; no noise is infinite."""
    return math.inf if noise <= 0 else -10 * math.log10(noise)


@dataclass
class _Rounding:
    """One thing to round: the outputs of some nodes, or the weight of some layers."""

    entry: Sensitivity
    outputs: dict[Node, TensorQuantization]
    weights: dict[Node, Tensor]
    error: float = 0.0


@torch.no_grad()
def measure(
    graph_module: GraphModule, plan: QuantizationPlan, samples: Iterable[Sequence[Tensor]]
) -> list[Sensitivity]:
    """Every rounding of a plan, most harmful first. `samples`: inputs of batch 1."""
    roundings = [*_activations(graph_module, plan), *_weights(graph_module, plan)]
    signal = 0.0
    for inputs in samples:
        exact = _values(graph_module, inputs)
        expected = _outputs(graph_module, exact)
        signal += sum(float(o.double().square().sum()) for o in expected)
        for rounding in roundings:
            found = _outputs(graph_module, _again(graph_module, exact, rounding))
            pairs = zip(found, expected, strict=True)
            rounding.error += sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    entries = [replace(r.entry, noise=r.error / max(signal, 1e-30)) for r in roundings]
    return sorted(entries, key=lambda s: -s.noise)


def _activations(graph_module: GraphModule, plan: QuantizationPlan) -> list[_Rounding]:
    nodes = {n.name: n for n in graph_module.graph.nodes}
    found = []
    for members in scales.group(graph_module, 8).members().values():
        kept = [m for m in members if m in plan.activations]
        if kept:
            first, bits = nodes[kept[0]], plan.activations[kept[0]].spec.bits
            elements = sum(nodes[m].meta["val"].numel() for m in kept)
            entry = Sensitivity("activation", first.name, _module(first), tuple(kept), bits, elements, 0.0)
            found.append(_Rounding(entry, {nodes[m]: plan.activations[m] for m in kept}, {}))
    return found


def _weights(graph_module: GraphModule, plan: QuantizationPlan) -> list[_Rounding]:
    found = []
    for name, layers in scales.weight_nodes(graph_module).items():
        q = plan.weights.get(name)
        if q is not None and q.values is not None:
            weight = torch.from_numpy(affine.dequantize(q.values, q))
            names = tuple(n.name for n in layers)
            entry = Sensitivity("weight", name, _module(layers[0]), names, q.spec.bits, weight.numel(), 0.0)
            found.append(_Rounding(entry, {}, dict.fromkeys(layers, weight)))
    return found


def _module(node: Node) -> str:
    return str(node.meta.get("module") or "")


def _compute(node: Node, values: Mapping[Node, Any]) -> Any:
    return node.target(*map_arg(node.args, lambda n: values[n]), **map_arg(node.kwargs, lambda n: values[n]))


def _values(graph_module: GraphModule, inputs: Sequence[Tensor]) -> dict[Node, Any]:
    values: dict[Node, Any] = {}
    given = iter(inputs)
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = constants.value_of(graph_module, node)
        elif node.op == "call_function":
            values[node] = _compute(node, values)
    return values


class _Overlay(dict[Node, Any]):
    """Values that changed, and below them those that did not."""

    def __init__(self, below: dict[Node, Any]) -> None:
        super().__init__()
        self.below = below

    def __missing__(self, node: Node) -> Any:
        return self.below[node]


def _again(graph_module: GraphModule, exact: dict[Node, Any], rounding: _Rounding) -> dict[Node, Any]:
    """Values of all nodes with one thing rounded; only what depends on it is computed."""
    values = _Overlay(exact)
    for node in graph_module.graph.nodes:
        if node in rounding.weights:
            inputs = {n: values[n] for n in node.all_input_nodes}
            values[node] = _compute(node, {**inputs, node.args[1]: rounding.weights[node]})
        elif node.op == "call_function" and any(n in values for n in node.all_input_nodes):
            values[node] = _compute(node, values)
        if node in rounding.outputs:
            values[node] = _rounded(values[node], rounding.outputs[node])
    return values


def _rounded(value: Tensor, q: TensorQuantization) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(
        value, float(q.scale), int(q.zero_point), q.spec.qmin, q.spec.qmax
    )


def _outputs(graph_module: GraphModule, values: Mapping[Node, Any]) -> list[Tensor]:
    outputs = graph_module.graph.find_nodes(op="output")[0].all_input_nodes
    found = [values[n] for n in outputs]
    return [v for v in found if isinstance(v, Tensor) and v.is_floating_point()]


def worst(found: Sequence[Sensitivity], kind: str, to_noise: float) -> list[Sensitivity]:
    """The fewest roundings of a kind that must go for the noise of all in `found` to sum to `to_noise`."""
    total = sum(s.noise for s in found)
    chosen = []
    for each in sorted((s for s in found if s.kind == kind), key=lambda s: -s.noise):
        if total <= to_noise:
            break
        chosen.append(each)
        total -= each.noise
    return chosen
