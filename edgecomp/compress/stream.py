"""One pass over a graph with all calibration samples at once, float and quantized side by side.

A layer is decided when its turn comes, from what its inputs really are after everything before it was
quantized; values are freed after their last reader, so memory is that of the widest place in the net.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from edgecomp.graph import constants
from edgecomp.graph.vocabulary import WEIGHTED
from edgecomp.spec import TensorQuantization


@dataclass
class Layer:
    """A weighted layer at its turn. `float_inputs`, `inputs`: its input for each sample."""

    node: Node
    float_inputs: list[Tensor]
    inputs: list[Tensor]


Decide = Callable[[Layer], tuple[Tensor, Tensor | None]]
"""Gives the weight and bias that the quantized pass uses from here on."""


@torch.no_grad()
def run(
    graph_module: GraphModule,
    samples: Sequence[tuple[Tensor, ...]],
    activations: dict[str, TensorQuantization],
    decide: Decide,
) -> None:
    """Walk the graph once. `decide` is called for every weighted layer with a stored weight."""
    exact: dict[Node, list[Any]] = {}
    rounded: dict[Node, list[Any]] = {}
    doors = iter(range(len(samples[0])))
    for node in graph_module.graph.nodes:
        if node.op == "output":
            break
        if node.op == "placeholder":
            index = next(doors)
            exact[node] = [s[index] for s in samples]
            rounded[node] = exact[node]
        elif node.op == "get_attr":
            exact[node] = rounded[node] = [constants.value_of(graph_module, node)] * len(samples)
        else:
            exact[node] = [_compute(node, exact, i) for i in range(len(samples))]
            rounded[node] = _quantized(node, exact, rounded, len(samples), decide)
        if node.name in activations and node.op != "get_attr":
            rounded[node] = [_round(v, activations[node.name]) for v in rounded[node]]
        elif node.name in activations:
            rounded[node] = [_round(rounded[node][0], activations[node.name])] * len(samples)
        _free(node, exact, rounded)


def _quantized(
    node: Node, exact: dict[Node, list[Any]], rounded: dict[Node, list[Any]], count: int, decide: Decide
) -> list[Any]:
    replaced: dict[Node, Any] = {}
    if node.target in WEIGHTED and constants.is_constant(node.args[1]):
        weight, bias = decide(Layer(node, exact[node.args[0]], rounded[node.args[0]]))
        replaced[node.args[1]] = weight
        if bias is not None:
            replaced[node.args[2]] = bias
    return [_compute(node, rounded, i, replaced) for i in range(count)]


def _compute(
    node: Node, values: dict[Node, list[Any]], index: int, replaced: dict[Node, Any] | None = None
) -> Any:
    def value(n: Node) -> Any:
        return replaced[n] if replaced and n in replaced else values[n][index]

    return node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))


def _round(value: Tensor, q: TensorQuantization) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(
        value, float(q.scale), int(q.zero_point), q.spec.qmin, q.spec.qmax
    )


def _free(node: Node, *stores: dict[Node, list[Any]]) -> None:
    """Drop values whose readers have all run (nodes are in topological order)."""
    for source in node.all_input_nodes:
        if all(u is node or u in stores[0] for u in source.users):
            for store in stores:
                store.pop(source, None)
