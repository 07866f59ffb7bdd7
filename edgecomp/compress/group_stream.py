"""One pass over a graph with all calibration samples, weights quantized as their turn comes.

Linear layers that read the same value (the projections of an attention) make one stage: they see the same
inputs, and are decided together. Values are freed after their last reader, and what no later layer needs is
never computed, so memory is that of the widest place between two layers, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from edgecomp.graph import constants

aten = torch.ops.aten


@dataclass
class Stage:
    """Linear layers with one input. `inputs`: it for every sample, as the rounded layers before give it."""

    source: Node
    layers: list[Node]
    inputs: list[Tensor]


Decide = Callable[[Stage], None]
"""Decides the weights of a stage; may divide `stage.inputs` by a scale, in place."""


def stages(graph_module: GraphModule, layers: Sequence[Node]) -> dict[Node, list[Node]]:
    """The first layer of every stage -> all layers of it, in order."""
    by_source: dict[Node, list[Node]] = {}
    for layer in layers:
        by_source.setdefault(layer.args[0], []).append(layer)
    return {group[0]: group for group in by_source.values()}


@torch.no_grad()
def run(
    graph_module: GraphModule,
    samples: Sequence[tuple[Tensor, ...]],
    layers: Sequence[Node],
    restored: Mapping[str, Tensor],
    decide: Decide,
) -> None:
    """Walk the graph once. `restored`: weights by name, used from their decision on; `decide` fills it."""
    firsts = stages(graph_module, layers)
    needed = _ancestors([group[0].args[0] for group in firsts.values()])
    readers = _last_readers(graph_module, needed, firsts)
    values: dict[Node, list[Any]] = {}
    for index, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        values[node] = [sample[index] for sample in samples]
    for node in graph_module.graph.nodes:
        if node in firsts:
            source = node.args[0]
            decide(Stage(source, firsts[node], values[source]))
        if node.op == "call_function" and node in needed:
            values[node] = [_compute(graph_module, node, values, i, restored) for i in range(len(samples))]
        for used in readers.get(node, ()):
            values.pop(used, None)


def _last_readers(
    graph_module: GraphModule, needed: set[Node], firsts: Mapping[Node, list[Node]]
) -> dict[Node, list[Node]]:
    """Node -> values that nobody reads after it."""
    last: dict[Node, Node] = {}
    for node in graph_module.graph.nodes:
        if node in needed or node in firsts:
            last.update(dict.fromkeys(node.all_input_nodes, node))
    found: dict[Node, list[Node]] = {}
    for used, reader in last.items():
        found.setdefault(reader, []).append(used)
    return found


def _ancestors(nodes: Sequence[Node]) -> set[Node]:
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _compute(
    graph_module: GraphModule,
    node: Node,
    values: Mapping[Node, list[Any]],
    index: int,
    restored: Mapping[str, Tensor],
) -> Any:
    def value(n: Node) -> Any:
        if n.op == "get_attr":
            known = restored.get(str(n.target))
            return constants.value_of(graph_module, n) if known is None else known
        return values[n][index]

    return node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))
