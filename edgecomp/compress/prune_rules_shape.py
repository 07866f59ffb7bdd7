"""Rules of operations that only move or select elements: views, concatenation, slices."""

from __future__ import annotations

import torch
from torch.fx import Node

from edgecomp.compress import prune_views as views
from edgecomp.compress.prune_labels import Dims, fixed, labelled
from edgecomp.compress.prune_rules import Tracer, argument, kept_where_equal, rule

aten = torch.ops.aten


@rule(aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze)
@rule(aten.squeeze_, aten.reshape_as, aten.view_as)
def _view(tracer: Tracer, node: Node) -> Dims:
    heads, before = tracer.heads(node), tracer.dims(node.args[0])
    where = tracer.where(node)
    dims = views.reshape(tracer.labels, before, tracer.shape(node), where, tuple(heads.values()))
    for attribute, count in heads.items():
        for dim in dims:
            if len(dim) == count and labelled(dim) and len(dims) > len(before):
                tracer.counted(node, attribute, dim)
    return dims


@rule(aten.permute)
def _permute(tracer: Tracer, node: Node) -> Dims:
    dims = tracer.dims(node.args[0])
    return [dims[i] for i in node.args[1]]


@rule(aten.transpose, aten.t, aten.swapaxes, aten.numpy_T)
def _transpose(tracer: Tracer, node: Node) -> Dims:
    dims = list(tracer.dims(node.args[0]))
    a, b = (node.args[1], node.args[2]) if len(node.args) > 2 else (0, len(dims) - 1)
    dims[a], dims[b] = dims[b], dims[a]
    return dims


@rule(aten.expand, aten.expand_as, aten.repeat)
def _expand(tracer: Tracer, node: Node) -> Dims:
    dims, shape = tracer.dims(node.args[0]), tracer.shape(node)
    dims = [*fixed(shape[: len(shape) - len(dims)]), *dims]
    result = fixed(shape)
    for axis, dim in enumerate(dims):
        if len(dim) == shape[axis]:
            result[axis] = dim
        elif len(dim) > 1:
            tracer.labels.lock(dim, f"is repeated at {tracer.where(node)}")
    return result


@rule(aten.cat, aten.concat, aten.concatenate)
def _cat(tracer: Tracer, node: Node) -> Dims:
    parts = [tracer.dims(n) for n in node.args[0]]
    rank = len(tracer.shape(node))
    parts = [p for p in parts if len(p) == rank]  # an empty cache of keys is a vector of no elements
    return views.concatenate(tracer.labels, parts, argument(node, 1, "dim", 0), tracer.where(node))


@rule(aten.stack)
def _stack(tracer: Tracer, node: Node) -> Dims:
    parts, axis = [tracer.dims(n) for n in node.args[0]], argument(node, 1, "dim", 0)
    dims = views.broadcast(tracer.labels, parts, tracer.where(node))
    axis %= len(dims) + 1
    return [*dims[:axis], *fixed([len(parts)]), *dims[axis:]]


@rule(aten.chunk)
def _chunk(tracer: Tracer, node: Node) -> list[Dims]:
    axis = argument(node, 2, "dim", 0)
    return views.chunk(tracer.labels, tracer.dims(node.args[0]), node.args[1], axis, tracer.where(node))


@rule(aten._assert_tensor_metadata, aten._assert_scalar, aten.sym_size, aten.arange)
def _says_nothing(tracer: Tracer, node: Node) -> Dims:
    return fixed(tracer.shape(node))


@rule(aten.glu)
def _glu(tracer: Tracer, node: Node) -> Dims:
    axis = argument(node, 1, "dim", -1)
    return views.chunk(tracer.labels, tracer.dims(node.args[0]), 2, axis, tracer.where(node))[0]


@rule(aten.split, aten.split_with_sizes)
def _split(tracer: Tracer, node: Node) -> list[Dims]:
    dims, axis = tracer.dims(node.args[0]), argument(node, 2, "dim", 0)
    axis %= len(dims)
    tracer.labels.lock(dims[axis], f"is split into fixed widths at {tracer.where(node)}")
    return [[*dims[:axis], *fixed([v.shape[axis]]), *dims[axis + 1 :]] for v in node.meta["val"]]


@rule(aten.unbind)
def _unbind(tracer: Tracer, node: Node) -> list[Dims]:
    dims, axis = tracer.dims(node.args[0]), argument(node, 1, "dim", 0)
    axis %= len(dims)
    tracer.labels.lock(dims[axis], f"is unbound at {tracer.where(node)}")
    return [[*dims[:axis], *dims[axis + 1 :]] for _ in node.meta["val"]]


@rule(aten.select)
def _select(tracer: Tracer, node: Node) -> Dims:
    dims = tracer.dims(node.args[0])
    axis = node.args[1] % len(dims)
    if labelled(dims[axis]):
        tracer.labels.lock(dims[axis], f"is indexed at {tracer.where(node)}")
    return [*dims[:axis], *dims[axis + 1 :]]


@rule(aten.slice, aten.narrow)
def _slice(tracer: Tracer, node: Node) -> Dims:
    dims, shape = tracer.dims(node.args[0]), tracer.shape(node)
    return kept_where_equal(tracer, node, dims, shape, "is sliced")


@rule(aten.pixel_shuffle)
def _pixel_shuffle(tracer: Tracer, node: Node) -> Dims:
    dims, where = tracer.dims(node.args[0]), tracer.where(node)
    blocks = dims[1].reshape(-1, node.args[1] ** 2)
    for column in blocks.T[1:]:
        tracer.labels.unite(blocks[:, 0], column, where)
    return [dims[0], blocks[:, 0], *fixed(tracer.shape(node)[2:])]
