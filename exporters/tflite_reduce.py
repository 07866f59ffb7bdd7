"""Reductions over axes, cumulative sums, positions of extremes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from edgecomp.exporters import tflite_layout as layout
from edgecomp.exporters.tflite_file import Quant, Tensor, type_of
from edgecomp.exporters.tflite_lower import Lowering, Value
from edgecomp.exporters.tflite_table import Unsupported, args, argument, lowers

aten = torch.ops.aten

# In integers it is a product with a triangle of ones, which grows with the square of the length.
_LONGEST_INTEGER_CUMSUM = 1024


def _axes(rank: int, dims: Any) -> list[int]:
    if dims is None or (isinstance(dims, Sequence) and not dims):
        return list(range(rank))
    return sorted({int(d) % rank for d in ([dims] if isinstance(dims, int) else dims)})


def reduce(
    ctx: Lowering,
    node: Node,
    code: str,
    dims: Any,
    keep: bool,
    value: Value,
    *,
    moves: bool = False,
    quant: Quant | None = None,
) -> Value:
    """`moves`: the kernel wants one scale on both sides (maximum, minimum)."""
    rank = len(value.perm)
    axes = _axes(rank, dims)
    stored_axes = sorted(value.perm.index(a) for a in axes)
    if not stored_axes:
        return value
    if keep:
        stored = tuple(1 if i in stored_axes else n for i, n in enumerate(value.tensor.shape))
        perm = value.perm
    else:
        stored = tuple(n for i, n in enumerate(value.tensor.shape) if i not in stored_axes)
        left = [p for p in value.perm if p not in axes]
        perm = tuple(sorted(left).index(p) for p in left)
    made = ctx.result(node, stored, like=value.tensor if moves else None, quant=quant)
    inputs = [value.tensor, ctx.numbers(stored_axes, "axes")]
    ctx.draft.emit(code, inputs, [made], "ReducerOptions", keepDims=keep)
    return Value(made, perm)


@lowers(aten.mean.dim)
def mean(ctx: Lowering, node: Node) -> Value:
    value = ctx.input(node, args(node)[0])
    return reduce(
        ctx, node, "MEAN", argument(node, 1, "dim"), bool(argument(node, 2, "keepdim", False)), value
    )


@lowers(aten.mean.default)
def mean_of_all(ctx: Lowering, node: Node) -> Value:
    return reduce(ctx, node, "MEAN", None, False, ctx.input(node, args(node)[0]))


@lowers(aten.sum.dim_IntList)
def sum_(ctx: Lowering, node: Node) -> Value:
    return _sum(ctx, node, argument(node, 1, "dim"), bool(argument(node, 2, "keepdim", False)))


@lowers(aten.sum.default)
def sum_of_all(ctx: Lowering, node: Node) -> Value:
    return _sum(ctx, node, None, False)


def _sum(ctx: Lowering, node: Node, dims: Any, keep: bool) -> Value:
    """In integers: n times the mean. LiteRT's reference kernel for SUM reads int8 as uint8 (2.3.0)."""
    value = _numeric(ctx, node, ctx.input(node, args(node)[0]))
    quant = ctx.made_quant(node) if ctx.is_integer(node) else None
    if quant is None:
        return reduce(ctx, node, "SUM", dims, keep, value)
    count = int(np.prod([value.shape[a] for a in _axes(len(value.perm), dims)]))
    finer = replace(quant, scale=(quant.scale / np.float32(count)).astype(np.float32))
    mean = reduce(ctx, node, "MEAN", dims, keep, value, quant=finer)
    made = ctx.result(node, mean.tensor.shape)
    number = ctx.constant_operand(node, float(count), np.array(count, np.float32))
    ctx.draft.emit("MUL", [mean.tensor, number], [made], "MulOptions", fusedActivationFunction=0)
    return Value(made, mean.perm)


def _numeric(ctx: Lowering, node: Node, value: Value) -> Value:
    """Booleans are counted as int32."""
    return Value(_as_int32(ctx, node, value.tensor), value.perm) if value.tensor.dtype == "bool" else value


def _as_int32(ctx: Lowering, node: Node, x: Tensor) -> Tensor:
    made = Tensor(ctx.label(node, "cast"), x.shape, "int32")
    return ctx.draft.emit(
        "CAST", [x], [made], "CastOptions", inDataType=type_of(x.dtype), outDataType=type_of("int32")
    )


@lowers(aten.amax.default, aten.amin.default)
def extreme(ctx: Lowering, node: Node) -> Value:
    code = "REDUCE_MAX" if node.target is aten.amax.default else "REDUCE_MIN"
    value = ctx.input(node, args(node)[0])
    return reduce(
        ctx,
        node,
        code,
        argument(node, 1, "dim"),
        bool(argument(node, 2, "keepdim", False)),
        value,
        moves=True,
    )


@lowers(aten.max.dim, aten.min.dim)
def extreme_and_position(ctx: Lowering, node: Node) -> list[Value]:
    largest = node.target is aten.max.dim
    value = ctx.input(node, args(node)[0])
    dim, keep = int(args(node)[1]), bool(argument(node, 2, "keepdim", False))
    axis = value.perm.index(dim % len(value.perm))
    stored = value.tensor.shape[:axis] + value.tensor.shape[axis + 1 :]
    perm = tuple(p - (p > dim % len(value.perm)) for p in value.perm if p != dim % len(value.perm))
    kept = (*value.tensor.shape[:axis], 1, *value.tensor.shape[axis + 1 :])
    top = ctx.part(node, "extreme", kept if keep else stored, value.tensor)
    inputs = [value.tensor, ctx.numbers([axis], "axes")]
    ctx.draft.emit("REDUCE_MAX" if largest else "REDUCE_MIN", inputs, [top], "ReducerOptions", keepDims=keep)
    where = _position(ctx, node, value.tensor, axis, "ARG_MAX" if largest else "ARG_MIN", stored)
    if keep:
        where = ctx.reshape(node, where, kept)
    return [Value(top, value.perm if keep else perm), Value(where, value.perm if keep else perm)]


def _position(ctx: Lowering, node: Node, x: Tensor, axis: int, code: str, stored: layout.Shape) -> Tensor:
    """The kernels take no int16: the order of its integers is that of their int32 copies."""
    x = _as_int32(ctx, node, x) if x.dtype == "int16" else x
    made = Tensor(ctx.label(node, "position"), stored, "int32")
    table = "ArgMaxOptions" if code == "ARG_MAX" else "ArgMinOptions"
    inputs = [x, ctx.numbers(axis, "axis")]
    return ctx.draft.emit(code, inputs, [made], table, outputType=type_of("int32"))


@lowers(aten.argmax.default, aten.argmin.default)
def position(ctx: Lowering, node: Node) -> Value:
    """On quantized values as they are stored: the order is the same."""
    value = ctx.input(node, args(node)[0], as_stored=True)
    dim, keep = argument(node, 1, "dim"), bool(argument(node, 2, "keepdim", False))
    code = "ARG_MAX" if node.target is aten.argmax.default else "ARG_MIN"
    if dim is None:
        value = ctx.relaid(node, value, layout.identity(len(value.perm)))
        flat = ctx.reshape(node, value.tensor, (int(np.prod(value.tensor.shape)),))
        made = _position(ctx, node, flat, 0, code, ())
        return Value(ctx.reshape(node, made, ctx.shape_of(node)), layout.identity(len(ctx.shape_of(node))))
    axis = value.perm.index(int(dim) % len(value.perm))
    stored = value.tensor.shape[:axis] + value.tensor.shape[axis + 1 :]
    made = _position(ctx, node, value.tensor, axis, code, stored)
    if keep:
        kept = (*stored[:axis], 1, *stored[axis:])
        return Value(ctx.reshape(node, made, kept), value.perm)
    gone = int(dim) % len(value.perm)
    return Value(made, tuple(p - (p > gone) for p in value.perm if p != gone))


@lowers(aten.prod.dim_int)
def product(ctx: Lowering, node: Node) -> Value:
    if ctx.is_integer(node):
        raise Unsupported("a product of quantized values overflows; let the plan leave it float")
    value = ctx.input(node, args(node)[0])
    return reduce(
        ctx, node, "REDUCE_PROD", int(args(node)[1]), bool(argument(node, 2, "keepdim", False)), value
    )


@lowers(aten.any.dim, aten.any.dims, aten.any.default)
def any_(ctx: Lowering, node: Node) -> Value:
    dims = None if node.target is aten.any.default else argument(node, 1, "dim")
    keep = node.target is not aten.any.default and bool(argument(node, 2, "keepdim", False))
    value = ctx.input(node, args(node)[0])
    if value.tensor.dtype != "bool":
        raise Unsupported("any of numbers; compare them first")
    return reduce(ctx, node, "REDUCE_ANY", dims, keep, value)


@lowers(aten.var.correction)
def variance(ctx: Lowering, node: Node) -> Value:
    """mean((x - mean(x))^2) * n / (n - correction), in float."""
    if ctx.is_integer(node):
        raise Unsupported("variance of quantized values; let the plan leave it float")
    value = ctx.input(node, args(node)[0])
    rank = len(value.perm)
    axes = _axes(rank, argument(node, 1, "dim"))
    correction = node.kwargs.get("correction", 1)
    count = int(np.prod([value.shape[a] for a in axes]))
    x, stored_axes = value.tensor, ctx.numbers([value.perm.index(a) for a in axes], "axes")
    kept = tuple(1 if value.perm[i] in axes else n for i, n in enumerate(x.shape))
    centre = ctx.part(node, "mean", kept, x)
    ctx.draft.emit("MEAN", [x, stored_axes], [centre], "ReducerOptions", keepDims=True)
    squares = ctx.part(node, "squares", x.shape, x)
    ctx.draft.emit("SQUARED_DIFFERENCE", [x, centre], [squares], "SquaredDifferenceOptions")
    factor = 1.0 / max(count - float(1 if correction is None else str(correction)), 0.0)
    weighted = ctx.part(node, "weighted", x.shape, x)
    number = ctx.draft.constant(np.array(factor, np.float32), f"{node.name}:factor")
    ctx.draft.emit("MUL", [squares, number], [weighted], "MulOptions", fusedActivationFunction=0)
    keep = bool(node.kwargs.get("keepdim", False))
    return reduce(ctx, node, "SUM", axes, keep, Value(weighted, value.perm))


@lowers(aten.linalg_vector_norm.default)
def vector_norm(ctx: Lowering, node: Node) -> Value:
    """sqrt(sum(x * x)), in float."""
    order = argument(node, 1, "ord", 2)
    if ctx.is_integer(node) or order != 2:
        raise Unsupported(f"a norm of order {order}, or of quantized values")
    value = ctx.input(node, args(node)[0])
    squares = ctx.part(node, "squares", value.tensor.shape, value.tensor)
    ctx.draft.emit("MUL", [value.tensor, value.tensor], [squares], "MulOptions", fusedActivationFunction=0)
    dims, keep = argument(node, 2, "dim"), bool(argument(node, 3, "keepdim", False))
    total = reduce(ctx, node, "SUM", dims, keep, Value(squares, value.perm))
    made = ctx.result(node, total.tensor.shape)
    ctx.draft.emit("SQRT", [total.tensor], [made])
    return Value(made, total.perm)


@lowers(aten.cumsum.default)
def cumsum(ctx: Lowering, node: Node) -> Value:
    value = ctx.input(node, args(node)[0])
    dim = int(args(node)[1]) % len(value.perm)
    if ctx.is_integer(node):
        return _integer_cumsum(ctx, node, value, dim)
    made = ctx.result(node, value.tensor.shape)
    inputs = [value.tensor, ctx.numbers(value.perm.index(dim), "axis")]
    ctx.draft.emit("CUMSUM", inputs, [made], "CumsumOptions", exclusive=False, reverse=False)
    return Value(made, value.perm)


def _integer_cumsum(ctx: Lowering, node: Node, value: Value, dim: int) -> Value:
    """FULLY_CONNECTED with a lower triangle of ones (integers 1, scale 1)."""
    rank, length = len(value.perm), value.shape[dim]
    if length > _LONGEST_INTEGER_CUMSUM:
        raise Unsupported(f"a cumulative sum of {length} quantized values; at most {_LONGEST_INTEGER_CUMSUM}")
    if value.perm[-1] != dim:
        value = ctx.relaid(node, value, (*(a for a in range(rank) if a != dim), dim))
    made = ctx.result(node, value.tensor.shape)
    triangle = np.tril(np.ones((length, length), np.int8))
    ones = ctx.draft.constant(triangle, f"{node.name}:triangle", "int8", Quant.of(1.0))
    ctx.draft.emit(
        "FULLY_CONNECTED", [value.tensor, ones, None], [made], "FullyConnectedOptions",
        keepNumDims=True, fusedActivationFunction=0,
    )  # fmt: skip
    return Value(made, value.perm)


@lowers(aten.topk.default)
def topk(ctx: Lowering, node: Node) -> list[Value]:
    """The largest values of the last axis and their positions."""
    value = ctx.input(node, args(node)[0])
    rank, count = len(value.perm), int(args(node)[1])
    dim = int(argument(node, 2, "dim", -1)) % rank
    if not argument(node, 3, "largest", True):
        raise Unsupported("topk of the smallest values")
    perm = (*(a for a in range(rank) if a != dim), dim)
    value = ctx.relaid(node, value, perm)
    stored = (*value.tensor.shape[:-1], count)
    top = ctx.part(node, "values", stored, value.tensor)
    where = Tensor(ctx.label(node, "indices"), stored, "int32")
    ctx.draft.emit("TOPK_V2", [value.tensor, ctx.numbers(count, "k")], [top, where], "TopKV2Options")
    return [Value(top, perm), Value(where, perm)]
