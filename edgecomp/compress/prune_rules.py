"""What each traced operation does to the labels of its tensors.

A rule takes the tracer and a node of the exported graph and returns the labels of the node's output.
Operations without a rule lock what goes in: nothing is pruned on a guess. Rules of operations that only
move or select elements are in `prune_rules_shape`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch.fx import Node

from edgecomp.compress import prune_views as views
from edgecomp.compress.prune_labels import Dims, Labels, fixed

aten = torch.ops.aten


class Tracer(Protocol):
    """What a rule may ask for."""

    labels: Labels

    def dims(self, node: Node) -> Dims: ...

    def shape(self, node: Node) -> tuple[int, ...]: ...

    def where(self, node: Node) -> str: ...

    def produced(self, weight: Node, dim: int) -> None:
        """Say that this dimension of a weight makes channels: the ones that can be removed."""

    def scaled(self, weight: Node) -> None:
        """Say that this vector is the scale of a batch normalization."""

    def heads(self, node: Node) -> Mapping[str, int]:
        """Attributes of the node's module that count attention heads, with their values."""

    def counted(self, node: Node, attribute: str, dim: np.ndarray) -> None:
        """Say that an attribute of the node's module counts the positions of this dimension."""


Rule = Callable[[Tracer, Node], Any]
RULES: dict[Any, Rule] = {}


def rule(*packets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for every overload of these operations."""

    def add(function: Rule) -> Rule:
        for packet in packets:
            RULES[packet] = function
        return function

    return add


def apply(tracer: Tracer, node: Node) -> Any:
    """Labels of the node's output: Dims, or a list of Dims for several outputs."""
    overload: Any = node.target
    packet = getattr(overload, "overloadpacket", overload)
    found = RULES.get(packet) or RULES.get(_out_of_place(packet))
    if found is not None:
        return found(tracer, node)
    if any(torch.Tag.pointwise in o.tags for o in (overload, *_overloads(_out_of_place(packet)))):
        return _pointwise(tracer, node)
    return opaque(tracer, node)


def _out_of_place(packet: Any) -> Any:
    """`aten.relu_` -> `aten.relu`: the tags of in-place operations are incomplete."""
    name = str(packet).partition(".")[2]
    return getattr(aten, name[:-1], None) if name.endswith("_") else packet


def _overloads(packet: Any) -> list[Any]:
    return [getattr(packet, name) for name in packet.overloads()] if hasattr(packet, "overloads") else []


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _tensors(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if hasattr(n.meta.get("val"), "shape")]


def opaque(tracer: Tracer, node: Node) -> Any:
    """Lock whatever goes into the node; nothing of its output can be removed."""
    for source in node.all_input_nodes:
        for dims in _as_list(tracer.dims(source)):
            for dim in dims:
                tracer.labels.lock(dim, f"goes into {node.target} at {tracer.where(node)}, which has no rule")
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return [fixed(getattr(v, "shape", ())) for v in value]
    return fixed(tracer.shape(node))


def _as_list(dims: Any) -> list[Dims]:
    return dims if dims and isinstance(dims[0], list) else [dims]


def _pointwise(tracer: Tracer, node: Node) -> Dims:
    operands = [tracer.dims(n) for n in _tensors(node)]
    if not operands:
        return fixed(tracer.shape(node))
    return views.broadcast(tracer.labels, operands, tracer.where(node))


@rule(aten.dropout, aten.dropout_, aten.feature_dropout, aten.alpha_dropout, aten.contiguous, aten.alias)
@rule(aten.hardswish, aten.hardsigmoid, aten.hardtanh, aten.relu6, aten.silu, aten.gelu, aten.elu, aten.selu)
@rule(aten.celu, aten.leaky_relu, aten.mish, aten.softplus, aten.threshold, aten.log_sigmoid, aten.rrelu)
@rule(aten.clone, aten.detach, aten.to, aten._to_copy, aten.clamp, aten.type_as, aten.lift_fresh_copy)
def _same(tracer: Tracer, node: Node) -> Dims:
    return tracer.dims(node.all_input_nodes[0])


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def _convolution(tracer: Tracer, node: Node) -> Dims:
    source, weight = node.args[0], node.args[1]
    bias, groups = argument(node, 2, "bias"), argument(node, 6, "groups", 1)
    x, w = tracer.dims(source), tracer.dims(weight)
    rank = len(w) - 2
    channels = x[len(x) - rank - 1]
    where = tracer.where(node)
    if groups == 1:
        tracer.labels.unite(w[1], channels, where)
    elif groups == len(channels):
        tracer.labels.unite(w[0], np.repeat(channels, len(w[0]) // groups), where)
    else:
        tracer.labels.unite(np.tile(w[1], groups), channels, where)
        _unite_groups(tracer.labels, w[0], groups, where)
    if bias is not None:
        tracer.labels.unite(w[0], tracer.dims(bias)[0], where)
    if groups != len(channels) or groups == 1:
        tracer.produced(weight, 0)
    return [*x[: len(x) - rank - 1], w[0], *fixed(tracer.shape(node)[-rank:])]


def _unite_groups(labels: Labels, channels: np.ndarray, groups: int, where: str) -> None:
    """Groups must stay equal in size: the k-th channel of each lives and dies with the others'."""
    parts = channels.reshape(groups, -1)
    for part in parts[1:]:
        labels.unite(parts[0], part, where)


@rule(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
def _transposed(tracer: Tracer, node: Node) -> Dims:
    source, weight = node.args[0], node.args[1]
    bias, groups = argument(node, 2, "bias"), argument(node, 6, "groups", 1)
    x, w = tracer.dims(source), tracer.dims(weight)
    rank = len(w) - 2
    channels = x[len(x) - rank - 1]
    where = tracer.where(node)
    depthwise = groups > 1 and groups == len(channels)
    tracer.labels.unite(w[0], channels, where)
    if depthwise:
        outputs = np.repeat(w[0], len(w[1]))
    else:
        _unite_groups(tracer.labels, w[0], groups, where)
        outputs = np.tile(w[1], groups)
        tracer.produced(weight, 1)
    if bias is not None:
        tracer.labels.unite(outputs, tracer.dims(bias)[0], where)
    return [*x[: len(x) - rank - 1], outputs, *fixed(tracer.shape(node)[-rank:])]


@rule(aten.linear)
def _linear(tracer: Tracer, node: Node) -> Dims:
    x, w = tracer.dims(node.args[0]), tracer.dims(node.args[1])
    bias, where = argument(node, 2, "bias"), tracer.where(node)
    tracer.labels.unite(w[1], x[-1], where)
    if bias is not None:
        tracer.labels.unite(w[0], tracer.dims(bias)[0], where)
    tracer.produced(node.args[1], 0)
    return [*x[:-1], w[0]]


@rule(aten.matmul, aten.mm, aten.bmm)
def _matmul(tracer: Tracer, node: Node) -> Any:
    a, b = tracer.dims(node.args[0]), tracer.dims(node.args[1])
    if len(a) < 2 or len(b) < 2:
        return opaque(tracer, node)
    where = tracer.where(node)
    tracer.labels.unite(a[-1], b[-2], where)
    outer = views.broadcast(tracer.labels, [a[:-2], b[:-2]], where) if len(a) + len(b) > 4 else []
    return [*outer, a[-2], b[-1]]


@rule(aten.scaled_dot_product_attention)
def _attention(tracer: Tracer, node: Node) -> Any:
    q, k, v = (tracer.dims(n) for n in node.args[:3])
    where = tracer.where(node)
    if len(q[-3]) != len(k[-3]):  # grouped queries: several query heads share one key head
        repeats = len(q[-3]) // len(k[-3])
        tracer.labels.unite(k[-3], v[-3], where)
        shared = tracer.labels.unite(np.repeat(k[-3], repeats), q[-3], where)
        k, v = [*k[:-3], shared, *k[-2:]], [*v[:-3], shared, *v[-2:]]
    tracer.labels.unite(q[-1], k[-1], where)
    tracer.labels.unite(k[-2], v[-2], where)
    outer = views.broadcast(tracer.labels, [q[:-2], k[:-2], v[:-2]], where)
    return [*outer, q[-2], v[-1]]


@rule(aten.batch_norm, aten.instance_norm)
def _batch_norm(tracer: Tracer, node: Node) -> Dims:
    dims = tracer.dims(node.args[0])
    for vector in node.args[1:5]:
        if isinstance(vector, Node):
            tracer.labels.unite(dims[1], tracer.dims(vector)[0], tracer.where(node))
    if isinstance(node.args[1], Node):
        tracer.scaled(node.args[1])
    return dims


@rule(aten.layer_norm, aten.rms_norm)
def _layer_norm(tracer: Tracer, node: Node) -> Dims:
    dims = tracer.dims(node.args[0])
    vectors = [n for n in (argument(node, 2, "weight"), argument(node, 3, "bias")) if isinstance(n, Node)]
    where = tracer.where(node)
    if not vectors or len(node.args[1]) != 1:
        for dim in dims[-len(node.args[1]) :]:
            tracer.labels.lock(dim, f"the width of {where} is written in its normalization")
        return dims
    for vector in vectors:
        tracer.labels.unite(dims[-1], tracer.dims(vector)[0], where)
    return dims


@rule(aten.group_norm)
def _group_norm(tracer: Tracer, node: Node) -> Dims:
    dims, where = tracer.dims(node.args[0]), tracer.where(node)
    vectors = [n for n in (argument(node, 2, "weight"), argument(node, 3, "bias")) if isinstance(n, Node)]
    if not vectors:
        tracer.labels.lock(dims[1], f"the width of {where} is written in its normalization")
        return dims
    _unite_groups(tracer.labels, dims[1], node.args[1], where)
    for vector in vectors:
        tracer.labels.unite(dims[1], tracer.dims(vector)[0], where)
    return dims


@rule(aten.prelu)
def _prelu(tracer: Tracer, node: Node) -> Dims:
    dims, slope = tracer.dims(node.args[0]), tracer.dims(node.args[1])[0]
    if len(slope) > 1:
        tracer.labels.unite(dims[1], slope, tracer.where(node))
    return dims


@rule(aten.embedding)
def _embedding(tracer: Tracer, node: Node) -> Dims:
    weight = tracer.dims(node.args[0])
    tracer.labels.lock(weight[0], "is the vocabulary of an embedding")
    tracer.produced(node.args[0], 1)
    return [*tracer.dims(node.args[1]), weight[1]]


@rule(aten.softmax, aten.log_softmax, aten._softmax, aten.cumsum, aten.flip, aten.roll, aten.sort)
def _along(tracer: Tracer, node: Node) -> Dims:
    dims = tracer.dims(node.args[0])
    for dim in dims[1:] if not isinstance(node.args[1], int) else [dims[node.args[1]]]:
        tracer.labels.lock(dim, f"{node.target} at {tracer.where(node)} runs along it")
    return dims


@rule(aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d)
@rule(aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d)
@rule(aten.adaptive_max_pool2d, aten.max_pool2d_with_indices)
@rule(aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten.upsample_nearest1d)
@rule(aten._upsample_nearest_exact2d)
def _spatial(tracer: Tracer, node: Node) -> Any:
    dims = tracer.dims(node.args[0])
    value = node.meta["val"]
    if isinstance(value, list | tuple):
        return [[*dims[:2], *fixed(v.shape[2:])] for v in value]
    return [*dims[:2], *fixed(tracer.shape(node)[2:])]


@rule(aten.pad, aten.constant_pad_nd, aten.reflection_pad2d, aten.replication_pad2d)
def _pad(tracer: Tracer, node: Node) -> Dims:
    dims, shape = tracer.dims(node.args[0]), tracer.shape(node)
    return kept_where_equal(tracer, node, dims, shape, "is padded")


def kept_where_equal(tracer: Tracer, node: Node, dims: Dims, shape: tuple[int, ...], what: str) -> Dims:
    result = fixed(shape)
    for axis, dim in enumerate(dims):
        if len(dim) == shape[axis]:
            result[axis] = dim
        else:
            tracer.labels.lock(dim, f"{what} at {tracer.where(node)}")
    return result


@rule(aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.std, aten.norm, aten.linalg_vector_norm)
@rule(aten.max, aten.min, aten.argmax, aten.logsumexp)
def _reduce(tracer: Tracer, node: Node) -> Any:
    if len(_tensors(node)) > 1:
        return _pointwise(tracer, node)
    dims = tracer.dims(node.args[0])
    position = 2 if node.target in (aten.norm.ScalarOpt_dim, aten.linalg_vector_norm.default) else 1
    axes = argument(node, position, "dim")
    axes = [axes] if isinstance(axes, int) else (axes or list(range(len(dims))))
    axes = {a % len(dims) for a in axes}
    value = node.meta["val"]
    first = value[0] if isinstance(value, list | tuple) else value
    keep = len(first.shape) == len(dims)
    result = []
    for axis, dim in enumerate(dims):
        if axis not in axes:
            result.append(dim)
        elif keep:
            result.extend(fixed([1]))
    return [result, result] if isinstance(value, list | tuple) else result


@rule(aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
def _recurrent(tracer: Tracer, node: Node) -> Any:
    """Hidden units of all layers and directions of one recurrent module live and die together."""
    x, parameters, has_bias, layers = tracer.dims(node.args[0]), node.args[2], node.args[3], node.args[4]
    directions, where = (2 if node.args[7] else 1), tracer.where(node)
    each = 4 if has_bias else 2
    states = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    hidden = tracer.dims(parameters[1])[1]
    if len(parameters) != layers * directions * each or any(_given(s) for s in states):
        return opaque(tracer, node)
    inputs = x[-1]
    for layer in range(layers):
        for direction in range(directions):
            start = (layer * directions + direction) * each
            w_in, w_hidden, *biases = (tracer.dims(p) for p in parameters[start : start + each])
            gates = len(w_in[0]) // len(hidden)
            tracer.labels.unite(w_in[1], inputs, where)
            tracer.labels.unite(w_hidden[1], hidden, where)
            for rows in (w_in[0], w_hidden[0], *(b[0] for b in biases)):
                tracer.labels.unite(rows, np.tile(hidden, gates), where)
            tracer.produced(parameters[start + 1], 0)
        inputs = np.tile(hidden, directions)
    state = [*fixed([layers * directions]), *x[:-2][:1], hidden]
    outputs: list[Dims] = [[*x[:-1], inputs]]
    return outputs + [state for _ in node.meta["val"][1:]]


def _given(state: Any) -> bool:
    """True when a start state comes from outside the module, whose own default is zeros."""
    while isinstance(state, Node) and state.target in (aten.expand.default, aten.to.dtype):
        state = state.args[0]
    return not (isinstance(state, Node) and state.target in (aten.zeros.default, aten.zeros_like.default))
