"""Which values of a graph get a scale, which share one, and which have a prescribed one.

The rules are those of TensorFlow Lite's 8-bit quantization specification, the tightest of the formats.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgecomp.graph import constants
from edgecomp.graph.patterns import fused_into
from edgecomp.graph.vocabulary import FIXED_8, FIXED_16, FREE_SCALE, QUANTIZED, SAME_SCALE, WEIGHTED

aten = torch.ops.aten


@dataclass
class ScaleGroups:
    """`root[name]`: the representative of all nodes that share a scale. `prescribed[root]`: its scale."""

    root: dict[str, str] = field(default_factory=dict)
    prescribed: dict[str, tuple[float, int]] = field(default_factory=dict)

    def find(self, name: str) -> str:
        while self.root[name] != name:
            self.root[name] = self.root[self.root[name]]
            name = self.root[name]
        return name

    def join(self, a: str, b: str) -> None:
        """One scale for both, unless two different prescriptions meet: then the exporter requantizes."""
        first, second = self.find(a), self.find(b)
        if first == second or (first in self.prescribed and second in self.prescribed):
            return
        keep, other = (second, first) if second in self.prescribed else (first, second)
        self.root[other] = keep

    def members(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in self.root:
            groups.setdefault(self.find(name), []).append(name)
        return groups


def weight_nodes(graph_module: GraphModule) -> dict[str, list[Node]]:
    """Weight name (target of a `get_attr`) -> the layers that use it; biases are not among them."""
    users: dict[str, list[Node]] = {}
    for node in graph_module.graph.nodes:
        if node.target in WEIGHTED and constants.is_constant(node.args[1]):
            users.setdefault(str(node.args[1].target), []).append(node)
    return users


def scaled_nodes(graph_module: GraphModule) -> list[Node]:
    """Nodes whose output is stored as integers, in graph order: float, and not fused into their user.

    Constants count where they are an operand of arithmetic; weights and biases have scales of their own.
    """
    fused = fused_into(graph_module.graph)
    return [n for n in graph_module.graph.nodes if n.name not in fused and _is_scaled(n)]


def _is_scaled(node: Node) -> bool:
    found = node.meta.get("val")
    if node.op == "output" or not isinstance(found, Tensor) or not found.is_floating_point():
        return False
    return node.op != "get_attr" or any(not _is_weight_or_bias(node, user) for user in node.users)


def _is_weight_or_bias(node: Node, user: Node) -> bool:
    return user.target in WEIGHTED and node in user.args[1:3]


def group(graph_module: GraphModule, bits: int) -> ScaleGroups:
    """Scale groups of all scaled nodes; sigmoid and the like bring their prescribed scale along."""
    nodes = scaled_nodes(graph_module)
    groups = ScaleGroups({n.name: n.name for n in nodes})
    prescriptions: Mapping = FIXED_8 if bits == 8 else FIXED_16
    for node in nodes:
        if node.target in prescriptions:
            groups.prescribed[node.name] = prescriptions[node.target]
    for node in nodes:
        if node.target in SAME_SCALE:
            _join_inputs(groups, node)
    return groups


def _join_inputs(groups: ScaleGroups, node: Node) -> None:
    inputs = [n for n in _moved_inputs(node) if n.name in groups.root]
    several = len(inputs) > 1
    for source in inputs:
        if several and groups.find(source.name) in groups.prescribed:
            continue  # requantized at the concatenation: its own scale is finer than the common one
        groups.join(source.name, node.name)


def _moved_inputs(node: Node) -> list[Node]:
    """The inputs whose values come out again: not indices, not conditions."""
    if node.target is operator.getitem and node.args[0].target is aten.split_with_sizes.default:
        return [node.args[0].args[0]]
    if node.target is aten.cat.default:
        return list(node.args[0])
    if node.target is aten.where.self:
        return [n for n in node.args[1:3] if isinstance(n, Node)]
    return node.all_input_nodes[:1]


def behind_pools(
    graph_module: GraphModule, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """A value that only max-pools read needs their outputs' range alone: the largest of clipped values is
    the clipped largest, so what lies below never comes out."""
    result = dict(ranges)
    for node in reversed(list(graph_module.graph.nodes)):
        pools = [u.name for u in node.users if u.target is aten.max_pool2d.default]
        if node.name in result and pools and len(pools) == len(node.users):
            seen = [result[p] for p in pools if p in result]
            if len(seen) == len(pools):
                result[node.name] = (min(low for low, _ in seen), max(high for _, high in seen))
    return result


def without_kernel(graph_module: GraphModule) -> dict[str, str]:
    """Nodes that compute with floats and have no integer kernel, with the reason."""
    found = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or not _reads_or_gives_float(node):
            continue
        if node.target not in QUANTIZED:
            found[node.name] = f"no integer kernel for {node.target}"
        elif node.target in FREE_SCALE and any(_is_whole(n) for n in node.all_input_nodes):
            found[node.name] = f"{node.target} reads whole numbers that have no scale"
    return found


def _is_whole(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.is_floating_point()


def _reads_or_gives_float(node: Node) -> bool:
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in values)
