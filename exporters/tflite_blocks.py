"""Rows of an embedding table stored in 4 bits with a scale for each block, restored by plain operations.

TFLite has no gather of 4-bit blocks. The table is stored as bytes, two integers in each, the left half of a
row in the low nibbles and the right half in the high ones; the rows that are asked for are gathered, taken
apart by arithmetic that float32 does exactly, and multiplied with their scales.
"""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from edgecomp.exporters import tflite_layout as layout
from edgecomp.exporters.tflite_file import Tensor
from edgecomp.exporters.tflite_lower import Lowering
from edgecomp.exporters.tflite_math import cast
from edgecomp.numerics import groupwise
from edgecomp.spec import TensorQuantization


def planned_rows(ctx: Lowering, name: str) -> TensorQuantization | None:
    """The plan's 4-bit integers of a table in groups, or None."""
    found = ctx.stored_plan.weights.get(name) if ctx.stored_plan is not None else None
    if found is None or found.values is None or found.spec.bits > 4 or found.values.shape[1] % 2:
        return None
    return found


def halves(values: np.ndarray) -> np.ndarray:
    """int8 [rows, n] in [-8, 7] -> uint8 [rows, n / 2]: the left half in the low nibbles, plus 8."""
    stored = (values.astype(np.int16) + 8).astype(np.uint8)
    middle = values.shape[1] // 2
    return stored[:, :middle] | (stored[:, middle:] << 4)


def rows(
    ctx: Lowering, node: Node, name: str, q: TensorQuantization, index: Tensor, stored: layout.Shape
) -> Tensor:
    """The rows of `index`, float32, of shape `stored`."""
    if q.values is None:
        raise ValueError("a stored table has integers")
    scale, zero, size = groupwise.in_groups(q)
    table = ctx.draft.constant(halves(q.values), name, "uint8")
    steps = _unpacked(ctx, node, table, index, stored)
    if zero.any():
        width = (*stored[:-1], zero.shape[1])
        zeros = _gathered(ctx, node, zero.astype(np.float32), f"{name}:zero_point", index, width)
        steps = _grouped(ctx, node, "SUB", steps, zeros, size, stored)
    scales = _gathered(
        ctx, node, scale.astype(np.float32), f"{name}:scale", index, (*stored[:-1], scale.shape[1])
    )
    return _grouped(ctx, node, "MUL", steps, scales, size, stored, ctx.result(node, stored))


def _unpacked(ctx: Lowering, node: Node, table: Tensor, index: Tensor, stored: layout.Shape) -> Tensor:
    """Gather bytes, and give integers in [-8, 7] as float32: high = floor(byte / 16), low is the rest."""
    half = (*stored[:-1], stored[-1] // 2)
    found = _emit(
        ctx, node, "GATHER", [table, index], "bytes", half, "uint8", "GatherOptions", axis=0, batchDims=0
    )
    byte = cast(ctx, node, found, "float32")
    high = _floor(ctx, node, _with_number(ctx, node, "MUL", byte, 1 / 16), half)
    shifted = _with_number(ctx, node, "MUL", high, 16.0)
    low = _emit(
        ctx, node, "SUB", [byte, shifted], "low", half, "float32", "SubOptions", fusedActivationFunction=0
    )
    whole = _emit(
        ctx, node, "CONCATENATION", [low, high], "nibbles", stored, "float32", "ConcatenationOptions",
        axis=len(stored) - 1, fusedActivationFunction=0,
    )  # fmt: skip
    return _with_number(ctx, node, "ADD", whole, -8.0)


def _gathered(
    ctx: Lowering, node: Node, array: np.ndarray, name: str, index: Tensor, shape: layout.Shape
) -> Tensor:
    table = ctx.draft.constant(array, name)
    return _emit(
        ctx, node, "GATHER", [table, index], "rows", shape, "float32", "GatherOptions", axis=0, batchDims=0
    )


def _grouped(
    ctx: Lowering,
    node: Node,
    code: str,
    values: Tensor,
    factors: Tensor,
    size: int,
    stored: layout.Shape,
    made: Tensor | None = None,
) -> Tensor:
    """values [..., n] with factors [..., n / size], each for its group."""
    apart = (*stored[:-1], stored[-1] // size, size)
    left = ctx.reshape(node, values, apart)
    right = ctx.reshape(node, factors, (*apart[:-1], 1))
    done = _emit(
        ctx, node, code, [left, right], "groups", apart, "float32", f"{code.title()}Options",
        fusedActivationFunction=0,
    )  # fmt: skip
    return ctx.reshape(node, done, stored, made) if made is not None else ctx.reshape(node, done, stored)


def _with_number(ctx: Lowering, node: Node, code: str, value: Tensor, number: float) -> Tensor:
    constant = ctx.draft.constant(np.full((1,), number, np.float32), f"{number:g}")
    return _emit(
        ctx, node, code, [value, constant], code.lower(), value.shape, "float32", f"{code.title()}Options",
        fusedActivationFunction=0,
    )  # fmt: skip


def _floor(ctx: Lowering, node: Node, value: Tensor, shape: layout.Shape) -> Tensor:
    return _emit(ctx, node, "FLOOR", [value], "high", shape, "float32", "")


def _emit(
    ctx: Lowering,
    node: Node,
    code: str,
    inputs: list[Tensor],
    what: str,
    shape: layout.Shape,
    dtype: str,
    table: str,
    **options: int,
) -> Tensor:
    made = Tensor(ctx.label(node, what), tuple(shape), dtype)
    return ctx.draft.emit(code, [*inputs], [made], table, **options)
