"""Groups of values whose channels may be scaled together without changing what a graph computes.

A layer gives channels (rows of a convolution or linear layer, the vector that a normalization multiplies by),
ReLU, zero padding, pooling and addition hand them on, and the next layers read them (columns). Scaling a
channel by any positive factor where it is given, and by its inverse where it is read, is exact; a group with
any other reader is left alone, one with ReLU6, GELU or hard-swish inside too, for they are not homogeneous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgecomp.compress.columns import groups_of, supported
from edgecomp.graph import constants

aten = torch.ops.aten

_HANDED_ON = {
    aten.relu.default,
    aten.constant_pad_nd.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.add.Tensor,
    aten.sub.Tensor,
}


@dataclass(frozen=True)
class ChannelGroup:
    """`layers` and `vectors` give the channels of `values`; `readers` take them. Node lists in graph order.

    `vectors`: (operation, position of its constant [channels] among the arguments). `axis`: of the channels
    in every value. `depthwise`: every reader keeps its channels apart.
    """

    values: tuple[Node, ...]
    layers: tuple[Node, ...]
    vectors: tuple[tuple[Node, int], ...]
    readers: tuple[Node, ...]
    axis: int

    @property
    def depthwise(self) -> bool:
        return all(groups_of(r) > 1 for r in self.readers)


def groups(graph_module: GraphModule) -> list[ChannelGroup]:
    """All groups that have at least one giver and one reader, in graph order."""
    axes: dict[Node, int] = {}
    parent: dict[Node, Node] = {}
    for node in graph_module.graph.nodes:
        axis = _axis(node, axes)
        if axis is not None:
            axes[node], parent[node] = axis, node
            for source in _carried(node, axes):
                parent[_root(parent, source)] = _root(parent, node)
    members: dict[Node, list[Node]] = {}
    for node in parent:
        members.setdefault(_root(parent, node), []).append(node)
    found = (_group(values, axes) for values in members.values())
    return sorted((g for g in found if g is not None), key=lambda g: list(axes).index(g.values[0]))


def _root(parent: dict[Node, Node], node: Node) -> Node:
    while parent[node] is not node:
        node = parent[node]
    return node


def _axis(node: Node, axes: dict[Node, int]) -> int | None:
    """The channel axis of a value that belongs to some group, or None."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor):
        return None
    if supported(node):
        return value.dim() - 1 if node.target is aten.linear.default else 1
    if node.target is aten.mul.Tensor and _vector(node) is not None:
        return value.dim() - 1
    carried = _carried(node, axes)
    if not carried or (node.target is aten.constant_pad_nd.default and _pad_value(node) != 0):
        return None
    return axes[carried[0]]


def _pad_value(node: Node) -> float:
    return float(node.args[2]) if len(node.args) > 2 else 0.0


def _carried(node: Node, axes: dict[Node, int]) -> list[Node]:
    """Operands whose channels come out of `node` as its own; empty where it does not hand channels on."""
    if node.target not in _HANDED_ON:
        return []
    inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
    shapes = {tuple(n.meta["val"].shape) for n in inputs} if len(inputs) > 1 else set()
    known = {axes.get(n) for n in inputs}
    if None in known or len(known) != 1 or len(shapes) > 1:
        return []
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and len(inputs) == 1:
        position = _vector(node)
        if position is None or axes[inputs[0]] != inputs[0].meta["val"].dim() - 1:
            return []
    return inputs


def _vector(node: Node) -> int | None:
    """Position of an operand that is a constant [channels], read by this node alone."""
    for position, source in enumerate(node.args[:2]):
        if constants.is_constant(source) and len(source.users) == 1:
            shape = source.meta["val"].shape
            if len(shape) == 1 and shape[0] == node.meta["val"].shape[-1] and shape[0] > 1:
                return position
    return None


def _group(values: list[Node], axes: dict[Node, int]) -> ChannelGroup | None:
    inside = set(values)
    layers = tuple(n for n in values if supported(n))
    readers: list[Node] = []
    for node in values:
        for user in node.users:
            if user in inside and user.target in _HANDED_ON:
                continue
            if not _reads_channels(user, node, axes[node]):
                return None
            readers.append(user)
    vectors = tuple((n, p) for n in values if not supported(n) for p in [_vector(n)] if p is not None)
    givers = [*layers, *(n for n, _ in vectors if n.target is aten.mul.Tensor)]
    if not readers or not givers or not all(_owns(n) for n in (*layers, *readers)):
        return None
    return ChannelGroup(tuple(values), layers, vectors, tuple(dict.fromkeys(readers)), axes[values[0]])


def _reads_channels(user: Node, value: Node, axis: int) -> bool:
    if user.op != "call_function" or not supported(user) or user.args[0] is not value:
        return False
    shape = value.meta["val"].shape
    expected = len(shape) - 1 if user.target is aten.linear.default else 1
    return axis == expected and groups_of(user) in (1, shape[axis])


def _owns(layer: Node) -> bool:
    """Weight and bias are constants that no other node reads."""
    operands = [a for a in layer.args[1:3] if isinstance(a, Node)]
    return all(constants.is_constant(a) and len(a.users) == 1 for a in operands)


def scale(graph_module: GraphModule, group: ChannelGroup, factors: Tensor) -> None:
    """Divide every channel of a group by its factor [channels], and multiply the columns that read it."""
    for layer in group.layers:
        for position in (1, 2):
            if len(layer.args) > position and isinstance(layer.args[position], Node):
                value = constants.value_of(graph_module, layer.args[position])
                _set(graph_module, layer, position, value / factors.reshape(-1, *[1] * (value.dim() - 1)))
    for node, position in group.vectors:
        value = constants.value_of(graph_module, node.args[position])
        _set(graph_module, node, position, value / factors)
    for reader in group.readers:
        weight = constants.value_of(graph_module, reader.args[1])
        _set(graph_module, reader, 1, weight * _columns(factors, weight, reader))


def _columns(factors: Tensor, weight: Tensor, reader: Node) -> Tensor:
    """Factors shaped to the weight of a reader; a depthwise channel's filters lie together."""
    if groups_of(reader) > 1:
        rows = factors.repeat_interleave(weight.shape[0] // len(factors))
        return rows.reshape(-1, *[1] * (weight.dim() - 1))
    return factors.reshape(1, -1, *[1] * (weight.dim() - 2))


def _set(graph_module: GraphModule, node: Node, position: int, value: Tensor) -> None:
    stem = str(node.args[position].target).removesuffix("_fit")
    node.update_arg(position, constants.add(graph_module, f"{stem}_fit", value, node))


def set_bias(graph_module: GraphModule, layer: Node, value: Tensor) -> None:
    """Give a layer a bias [out], in the place of its own or where it has none."""
    fresh = constants.add(graph_module, f"{layer.name}_bias_fit", value, layer)
    layer.args = (*layer.args[:2], fresh, *layer.args[3:])
