"""Reading by index: embedding tables, gathers, fancy indexing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from edgecomp.exporters import tflite_blocks
from edgecomp.exporters import tflite_layout as layout
from edgecomp.exporters import tflite_weights as weights
from edgecomp.exporters.tflite_file import Tensor
from edgecomp.exporters.tflite_lower import Lowering, Value
from edgecomp.exporters.tflite_math import cast
from edgecomp.exporters.tflite_table import Unsupported, args, lowers
from edgecomp.graph import constants

aten = torch.ops.aten


def _gather(ctx: Lowering, x: Tensor, index: Tensor, made: Tensor, axis: int) -> Tensor:
    return ctx.draft.emit("GATHER", [x, index], [made], "GatherOptions", axis=axis, batchDims=0)


@lowers(aten.embedding.default)
def embedding(ctx: Lowering, node: Node) -> Value:
    """GATHER of rows. In a weight-only target the table is stored as integers and its rows are restored."""
    source, index = args(node)[:2]
    indices = ctx.input(node, index, perm=layout.identity(len(ctx.shape_of(index))))
    stored = ctx.shape_of(node)
    if (
        constants.is_constant(source)
        and not ctx.is_integer(node)
        and ctx.numerics.weights in ("int8", "int4")
    ):
        return Value(
            _weight_only_rows(ctx, node, source, indices.tensor, stored), layout.identity(len(stored))
        )
    table = ctx.input(node, source, perm=(0, 1)).tensor
    made = ctx.result(node, stored, like=table)
    return Value(_gather(ctx, table, indices.tensor, made, 0), layout.identity(len(stored)))


def _weight_only_rows(ctx: Lowering, node: Node, source: Node, index: Tensor, stored: layout.Shape) -> Tensor:
    """Integer rows and their float32 scales, gathered side by side and multiplied."""
    planned = tflite_blocks.planned_rows(ctx, str(source.target))
    if planned is not None and ctx.numerics.weights == "int4":
        return tflite_blocks.rows(ctx, node, str(source.target), planned, index, stored)
    table = weights.read(ctx, node, source, 0)
    if table.scale is None:
        return _gather(ctx, ctx.input(node, source).tensor, index, ctx.result(node, stored), 0)
    integers = ctx.draft.constant(table.values.astype(np.int8), table.name, "int8")
    scales = ctx.draft.constant(table.scale.reshape(-1, 1).astype(np.float32), f"{table.name}:scale")
    rows = _gather(ctx, integers, index, Tensor(ctx.label(node, "rows"), stored, "int8"), 0)
    factors = Tensor(ctx.label(node, "scales"), (*stored[:-1], 1), "float32")
    _gather(ctx, scales, index, factors, 0)
    from_int8 = cast(ctx, node, rows, "float32")
    made = ctx.result(node, stored)
    return ctx.draft.emit("MUL", [from_int8, factors], [made], "MulOptions", fusedActivationFunction=0)


@lowers(aten.index_select.default)
def index_select(ctx: Lowering, node: Node) -> Value:
    x, dim, index = args(node)[:3]
    return _along_axis(ctx, node, ctx.input(node, x), int(dim), index)


def _along_axis(ctx: Lowering, node: Node, value: Value, dim: int, index: Any) -> Value:
    """x[:, ..., index, ...]: the index's axes take the place of axis `dim`."""
    rank = len(value.perm)
    dim %= rank
    positions = _positions(ctx, node, index, value.shape[dim])
    axis, width = value.perm.index(dim), len(positions.shape)
    stored = (*value.tensor.shape[:axis], *positions.shape, *value.tensor.shape[axis + 1 :])
    made = ctx.result(node, stored, like=value.tensor)
    _gather(ctx, value.tensor, positions, made, axis)
    perm = [p if p < dim else p + width - 1 for p in value.perm if p != dim]
    perm[axis:axis] = range(dim, dim + width)
    return Value(made, tuple(perm))


def _positions(ctx: Lowering, node: Node, index: Any, size: int) -> Tensor:
    """int32 positions; PyTorch counts negative ones from the end, TFLite does not."""
    if constants.is_constant(index):
        array = ctx.array_of(index)
        if array.dtype == np.bool_:
            raise Unsupported("indexing by a boolean mask: the result's shape depends on the data")
        return ctx.draft.constant(
            np.where(array < 0, array + size, array).astype(np.int32), str(index.target)
        )
    if index.meta["val"].dtype is torch.bool:
        raise Unsupported("indexing by a boolean mask: the result's shape depends on the data")
    return ctx.input(node, index, perm=layout.identity(len(ctx.shape_of(index)))).tensor


@lowers(aten.index.Tensor)
def index(ctx: Lowering, node: Node) -> Value:
    """x[..., i, ...] with one index, or several index arrays on neighbouring axes."""
    source, indices = args(node)[:2]
    used = [d for d, i in enumerate(indices) if i is not None]
    value = ctx.input(node, source)
    if len(used) == 1:
        return _along_axis(ctx, node, value, used[0], indices[used[0]])
    if used != list(range(used[0], used[0] + len(used))):
        raise Unsupported("index arrays on axes that are not neighbours")
    return _together(ctx, node, value, used, [indices[d] for d in used])


def _together(ctx: Lowering, node: Node, value: Value, dims: list[int], indices: list[Any]) -> Value:
    """Constant index arrays: the axes are merged and one position says all of them."""
    if not all(constants.is_constant(i) for i in indices):
        return _gather_nd(ctx, node, value, dims, indices)
    value = ctx.relaid(node, value, layout.identity(len(value.perm)))
    shape = value.tensor.shape
    sizes = [shape[d] for d in dims]
    arrays = [np.where((a := ctx.array_of(i)) < 0, a + n, a) for i, n in zip(indices, sizes, strict=True)]
    flat = np.ravel_multi_index(tuple(np.broadcast_arrays(*arrays)), sizes).astype(np.int32)
    merged = (*shape[: dims[0]], int(np.prod(sizes)), *shape[dims[-1] + 1 :])
    x = ctx.reshape(node, value.tensor, merged)
    made = ctx.result(node, ctx.shape_of(node), like=x)
    _gather(ctx, x, ctx.draft.constant(flat, f"{node.name}:positions"), made, dims[0])
    return Value(made, layout.identity(len(made.shape)))


def _gather_nd(ctx: Lowering, node: Node, value: Value, dims: list[int], indices: list[Any]) -> Value:
    """Computed index arrays of one shape on the leading axes: PACK, then GATHER_ND."""
    shapes = {ctx.shape_of(i) for i in indices}
    if dims[0] != 0 or len(shapes) != 1:
        raise Unsupported("computed index arrays of different shapes, or not on the first axes")
    x = ctx.relaid(node, value, layout.identity(len(value.perm))).tensor
    parts = [_positions(ctx, node, i, x.shape[d]) for i, d in zip(indices, dims, strict=True)]
    packed = Tensor(ctx.label(node, "positions"), (*parts[0].shape, len(parts)), "int32")
    ctx.draft.emit("PACK", parts, [packed], "PackOptions", valuesCount=len(parts), axis=len(parts[0].shape))
    made = ctx.result(node, ctx.shape_of(node), like=x)
    ctx.draft.emit("GATHER_ND", [x, packed], [made], "GatherNdOptions")
    return Value(made, layout.identity(len(made.shape)))


@lowers(aten.gather.default)
def gather(ctx: Lowering, node: Node) -> Value:
    """out[i][j] = x[i][index[i][j]]: the flat position is index * stride plus that of the other axes."""
    source, dim, index = args(node)[:3]
    value = ctx.input(node, source)
    value = ctx.relaid(node, value, layout.identity(len(value.perm)))
    shape, out = value.tensor.shape, ctx.shape_of(node)
    dim = int(dim) % len(shape)
    strides = [int(np.prod(shape[d + 1 :])) for d in range(len(shape))]
    grid = np.indices(out, dtype=np.int32)
    base = sum(grid[d] * strides[d] for d in range(len(shape)) if d != dim) + np.zeros(out, np.int32)
    positions = _positions(ctx, node, index, shape[dim])
    if positions.data is not None:
        flat = ctx.draft.constant(
            (positions.data * strides[dim] + base).astype(np.int32), f"{node.name}:positions"
        )
    else:
        flat = _computed_positions(ctx, node, positions, base, strides[dim])
    x = ctx.reshape(node, value.tensor, (int(np.prod(shape)),))
    made = ctx.result(node, out, like=x)
    _gather(ctx, x, flat, made, 0)
    return Value(made, layout.identity(len(out)))


def _computed_positions(ctx: Lowering, node: Node, index: Tensor, base: np.ndarray, stride: int) -> Tensor:
    scaled, flat = (Tensor(ctx.label(node, part), index.shape, "int32") for part in ("scaled", "positions"))
    inputs = [index, ctx.draft.constant(np.array(stride, np.int32), "stride")]
    ctx.draft.emit("MUL", inputs, [scaled], "MulOptions", fusedActivationFunction=0)
    offset = ctx.draft.constant(base.astype(np.int32), f"{node.name}:base")
    return ctx.draft.emit(
        "ADD", [scaled, offset], [flat], "AddOptions", fusedActivationFunction=0, potScaleInt16=False
    )
