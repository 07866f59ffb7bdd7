"""Operations that move values and never change one: they keep dtype, scale and, where they can, layout."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from edgecomp.exporters import tflite_layout as layout
from edgecomp.exporters.tflite_file import Tensor
from edgecomp.exporters.tflite_lower import Lowering, Value
from edgecomp.exporters.tflite_table import Unsupported, args, argument, lowers
from edgecomp.graph import constants

aten = torch.ops.aten

# One operand in, the same arithmetic for every element: a shuffled axis passes through.
_POINTWISE = {aten.relu.default, aten.relu6.default, aten.hardswish.default, aten.sigmoid.default}


def axis_of(value: Value, dim: int) -> int:
    """The stored axis that holds torch axis `dim`."""
    return value.perm.index(dim % len(value.perm))


@lowers(
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default,
)  # fmt: skip
def reshape(ctx: Lowering, node: Node) -> Value:
    """No data moves when the merged axes lie together in the stored tensor, or only linear layers read it."""
    value = ctx.input(node, args(node)[0])
    after = ctx.shape_of(node)
    perm = layout.reshaped(value.shape, value.perm, after)
    if perm is None and _flattens_for_linear(node, value.shape, after):
        return _shuffled_flat(ctx, node, value, after)
    if perm is None:
        value = ctx.relaid(node, value, layout.identity(len(value.perm)))
        perm = layout.identity(len(after))
    stored = layout.stored_shape(after, perm)
    made = ctx.result(node, stored, like=value.tensor)
    return Value(ctx.reshape(node, value.tensor, stored, made), perm)


def _flattens_for_linear(node: Node, before: layout.Shape, after: layout.Shape) -> bool:
    """[N, C, H, W] -> [N, C*H*W] whose every reader is a linear layer with a stored weight."""
    flat = len(after) == 2 and len(before) >= 3 and after[0] == before[0]
    return flat and _read_by_linear_only(node)


def _read_by_linear_only(node: Node) -> bool:
    return bool(node.users) and all(
        _read_by_linear_only(user)
        if user.target in _POINTWISE
        else user.target is aten.linear.default
        and user.args[0] is node
        and constants.is_constant(user.args[1])
        for user in node.users
    )


def _shuffled_flat(ctx: Lowering, node: Node, value: Value, after: layout.Shape) -> Value:
    features = np.arange(int(np.prod(value.shape[1:]))).reshape(1, *value.shape[1:])
    if value.perm[0] != 0:
        value = ctx.relaid(node, value, layout.identity(len(value.perm)))
    order = features.transpose(value.perm).reshape(-1)
    made = ctx.result(node, after, like=value.tensor)
    return Value(ctx.reshape(node, value.tensor, after, made), (0, 1), (1, order))


@lowers(aten.permute.default, aten.transpose.int, aten.t.default)
def permute(ctx: Lowering, node: Node) -> Value:
    """Only the layout changes; data moves later, if anybody asks for another order."""
    value = ctx.input(node, args(node)[0])
    rank = len(value.perm)
    if node.target is aten.permute.default:
        dims = [int(d) % rank for d in args(node)[1]]
    else:
        swap = [int(d) % rank for d in args(node)[1:3]] or [0, rank - 1]
        dims = list(range(rank))
        dims[swap[0]], dims[swap[1]] = swap[1], swap[0]
    return Value(value.tensor, layout.permuted(value.perm, dims))


@lowers(aten.expand.default, aten.broadcast_to.default)
def expand(ctx: Lowering, node: Node) -> Value:
    value = ctx.input(node, args(node)[0])
    after = ctx.shape_of(node)
    perm = layout.widened(value.perm, len(after))
    extra = (1,) * (len(after) - len(value.perm))
    stored = layout.stored_shape(after, perm)
    if (*extra, *value.tensor.shape) == stored:
        made = ctx.result(node, stored, like=value.tensor)
        return Value(ctx.reshape(node, value.tensor, stored, made), perm)
    made = ctx.result(node, stored, like=value.tensor)
    shape = ctx.numbers(stored, "shape")
    ctx.draft.emit("BROADCAST_TO", [value.tensor, shape], [made], "BroadcastToOptions")
    return Value(made, perm)


@lowers(aten.repeat.default)
def repeat(ctx: Lowering, node: Node) -> Value:
    value = ctx.input(node, args(node)[0])
    times = [int(t) for t in args(node)[1]]
    perm = layout.widened(value.perm, len(times))
    x = ctx.reshape(node, value.tensor, (*(1,) * (len(times) - len(value.perm)), *value.tensor.shape))
    made = ctx.result(node, layout.stored_shape(ctx.shape_of(node), perm), like=x)
    ctx.draft.emit("TILE", [x, ctx.numbers([times[p] for p in perm], "times")], [made], "TileOptions")
    return Value(made, perm)


@lowers(aten.cat.default)
def cat(ctx: Lowering, node: Node) -> Value:
    """All parts in the layout of the largest; each on the scale of the result."""
    sources = list(args(node)[0])
    dim = int(argument(node, 1, "dim", 0)) % len(ctx.shape_of(node))
    sources = [s for s in sources if ctx.shape_of(s) != (0,)]
    perm = common_layout(ctx, node, sources)
    made = ctx.result(node, layout.stored_shape(ctx.shape_of(node), perm))
    parts = [ctx.requantized(s, ctx.input(node, s, perm=perm).tensor, made.quant) for s in sources]
    return Value(concatenate(ctx, parts, made, perm.index(dim)), perm)


def concatenate(ctx: Lowering, parts: Sequence[Tensor], made: Tensor, axis: int) -> Tensor:
    return ctx.draft.emit(
        "CONCATENATION", parts, [made], "ConcatenationOptions", axis=axis, fusedActivationFunction=0
    )


@lowers(aten.stack.default)
def stack(ctx: Lowering, node: Node) -> Value:
    sources = list(args(node)[0])
    shape = ctx.shape_of(node)
    dim = int(argument(node, 1, "dim", 0)) % len(shape)
    made = ctx.result(node, shape)
    plain = layout.identity(len(shape) - 1)
    parts = [ctx.requantized(s, ctx.input(node, s, perm=plain).tensor, made.quant) for s in sources]
    ctx.draft.emit("PACK", parts, [made], "PackOptions", valuesCount=len(parts), axis=dim)
    return Value(made, layout.identity(len(shape)))


def common_layout(ctx: Lowering, node: Node, sources: Sequence[Any]) -> layout.Perm:
    """The layout that moves the fewest elements: that of the largest computed operand of full rank."""
    rank = len(ctx.shape_of(node))
    best, size = layout.identity(rank), -1
    for source in sources:
        if source not in ctx.values:
            continue
        value = ctx.values[source]
        elements = int(np.prod(value.tensor.shape))
        moved = value.perm != layout.identity(len(value.perm))
        if len(value.perm) == rank and (elements, moved) > (size, best != layout.identity(rank)):
            best, size = value.perm, elements
    return best


@lowers(aten.split_with_sizes.default, aten.split.Tensor)
def split(ctx: Lowering, node: Node) -> list[Value]:
    value = ctx.input(node, args(node)[0])
    dim = int(argument(node, 2, "dim", 0)) % len(value.perm)
    axis = value.perm.index(dim)
    sizes = [int(t.shape[dim]) for t in node.meta["val"]]
    parts, start = [], 0
    outs = [
        ctx.part(
            node, f"part{i}", (*value.tensor.shape[:axis], s, *value.tensor.shape[axis + 1 :]), value.tensor
        )
        for i, s in enumerate(sizes)
    ]
    if len(set(sizes)) == 1:
        inputs = [ctx.numbers(axis, "axis"), value.tensor]
        ctx.draft.emit("SPLIT", inputs, outs, "SplitOptions", numSplits=len(outs))
    else:
        for out, size in zip(outs, sizes, strict=True):
            begin = ctx.numbers([start if a == axis else 0 for a in range(len(value.perm))], "begin")
            ctx.draft.emit(
                "SLICE", [value.tensor, begin, ctx.numbers(out.shape, "size")], [out], "SliceOptions"
            )
            start += size
    parts = [Value(out, value.perm) for out in outs]
    return parts


@lowers(operator.getitem)
def getitem(ctx: Lowering, node: Node) -> Value:
    made = ctx.values[args(node)[0]]
    if not isinstance(made, list) or int(args(node)[1]) >= len(made):
        raise Unsupported(f"output {args(node)[1]} of {args(node)[0].target}")
    return made[int(args(node)[1])]


@lowers(aten.slice.Tensor)
def slice_(ctx: Lowering, node: Node) -> Value:
    value = ctx.input(node, args(node)[0])
    axis = axis_of(value, int(argument(node, 1, "dim", 0)))
    size = value.tensor.shape[axis]
    start, end, step = slice(
        argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    ).indices(size)
    if step == 1:
        made = _sliced(ctx, node, value.tensor, axis, start, end - start)
    else:
        made = _strided(ctx, node, value.tensor, axis, start, end, step)
    return Value(made, value.perm)


def _sliced(ctx: Lowering, node: Node, x: Tensor, axis: int, start: int, size: int) -> Tensor:
    begin = [start if a == axis else 0 for a in range(len(x.shape))]
    stored = tuple(size if a == axis else n for a, n in enumerate(x.shape))
    made = ctx.result(node, stored, like=x)
    return ctx.draft.emit(
        "SLICE", [x, ctx.numbers(begin, "begin"), ctx.numbers(stored, "size")], [made], "SliceOptions"
    )


def _strided(ctx: Lowering, node: Node, x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    rank = range(len(x.shape))
    begin = [start if a == axis else 0 for a in rank]
    stop = [end if a == axis else x.shape[a] for a in rank]
    steps = [step if a == axis else 1 for a in rank]
    count = len(range(start, end, step))
    made = ctx.result(node, tuple(count if a == axis else x.shape[a] for a in rank), like=x)
    inputs = [x, ctx.numbers(begin, "begin"), ctx.numbers(stop, "end"), ctx.numbers(steps, "strides")]
    return ctx.draft.emit(
        "STRIDED_SLICE", inputs, [made], "StridedSliceOptions",
        beginMask=0, endMask=0, ellipsisMask=0, newAxisMask=0, shrinkAxisMask=0, offset=False,
    )  # fmt: skip


@lowers(aten.select.int)
def select(ctx: Lowering, node: Node) -> Value:
    """One element along an axis: SLICE, then the axis goes."""
    value = ctx.input(node, args(node)[0])
    dim = int(args(node)[1]) % len(value.perm)
    axis = value.perm.index(dim)
    index = int(args(node)[2]) % value.tensor.shape[axis]
    one = tuple(1 if a == axis else n for a, n in enumerate(value.tensor.shape))
    part = ctx.part(node, "slice", one, value.tensor)
    begin = ctx.numbers([index if a == axis else 0 for a in range(len(one))], "begin")
    ctx.draft.emit("SLICE", [value.tensor, begin, ctx.numbers(one, "size")], [part], "SliceOptions")
    perm = tuple(p - (p > dim) for p in value.perm if p != dim)
    stored = one[:axis] + one[axis + 1 :]
    made = ctx.result(node, stored, like=part)
    return Value(ctx.reshape(node, part, stored, made), perm)


@lowers(aten.constant_pad_nd.default)
def constant_pad(ctx: Lowering, node: Node) -> Value:
    value = ctx.input(node, args(node)[0])
    widths, fill = list(args(node)[1]), float(argument(node, 2, "value", 0.0) or 0.0)
    rank = len(value.perm)
    by_dim = [(0, 0)] * rank
    for i, (low, high) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        by_dim[rank - 1 - i] = (low, high)
    if min(widths) < 0:
        raise Unsupported(f"padding by {widths}; a negative width crops: slice instead")
    amounts = np.array([by_dim[p] for p in value.perm], np.int32)
    made = ctx.result(node, layout.stored_shape(ctx.shape_of(node), value.perm), like=value.tensor)
    inputs = [value.tensor, ctx.draft.constant(amounts, "paddings")]
    if fill == 0 and value.tensor.dtype != "int32":
        ctx.draft.emit("PAD", inputs, [made], "PadOptions")
        return Value(made, value.perm)
    inputs.append(_fill(ctx, node, fill, value.tensor))
    ctx.draft.emit("PADV2", inputs, [made], "PadV2Options")
    return Value(made, value.perm)


def _fill(ctx: Lowering, node: Node, fill: float, like: Tensor) -> Tensor:
    """A number in the dtype and scale of a tensor."""
    number = np.array(fill, np.float32)
    if like.quant is not None:
        limits = np.iinfo(like.dtype)
        steps = np.rint(np.float32(fill) / like.quant.scale[0]) + like.quant.zero_point[0]
        number = np.array(np.clip(steps, limits.min, limits.max))
    return ctx.draft.constant(number.astype(like.dtype), f"{node.name}:fill", like.dtype, like.quant)


@lowers(aten.flip.default)
def flip(ctx: Lowering, node: Node) -> Value:
    value = ctx.input(node, args(node)[0])
    x = value.tensor
    for dim in args(node)[1]:
        made = ctx.part(node, "reversed", x.shape, x)
        x = ctx.draft.emit(
            "REVERSE_V2", [x, ctx.numbers([axis_of(value, int(dim))], "axis")], [made], "ReverseV2Options"
        )
    return Value(x, value.perm)


@lowers(aten.roll.default)
def roll(ctx: Lowering, node: Node) -> Value:
    """Two slices change places along each axis."""
    value = ctx.input(node, args(node)[0])
    dims = [int(d) for d in argument(node, 2, "dims", [])]
    if not dims:
        raise Unsupported("roll over the flattened tensor; name the axes")
    x = value.tensor
    for shift, dim in zip(args(node)[1], dims, strict=True):
        axis = axis_of(value, dim)
        cut = (-int(shift)) % x.shape[axis]
        if cut:
            parts = [_piece(ctx, node, x, axis, cut, x.shape[axis]), _piece(ctx, node, x, axis, 0, cut)]
            x = concatenate(ctx, parts, ctx.part(node, "rolled", x.shape, x), axis)
    return Value(x, value.perm)


def _piece(ctx: Lowering, node: Node, x: Tensor, axis: int, start: int, end: int) -> Tensor:
    stored = tuple(end - start if a == axis else n for a, n in enumerate(x.shape))
    begin = ctx.numbers([start if a == axis else 0 for a in range(len(stored))], "begin")
    made = ctx.part(node, "piece", stored, x)
    return ctx.draft.emit("SLICE", [x, begin, ctx.numbers(stored, "size")], [made], "SliceOptions")
