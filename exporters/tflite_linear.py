"""Matrix products: FULLY_CONNECTED where one side is a weight, BATCH_MATMUL where both are computed."""

from __future__ import annotations

import numpy as np
import torch
from torch.fx import Node

from edgecomp.exporters import tflite_layout as layout
from edgecomp.exporters import tflite_weights as weights
from edgecomp.exporters.tflite_file import Tensor, activation
from edgecomp.exporters.tflite_lower import Lowering, Value
from edgecomp.exporters.tflite_table import Unsupported, args, lowers
from edgecomp.exporters.tflite_weights import Weight
from edgecomp.graph import constants

aten = torch.ops.aten


@lowers(aten.linear.default)
def linear(ctx: Lowering, node: Node) -> Value:
    """x [..., in] times weight [out, in]. A shuffled feature axis is undone in the weight's columns."""
    x, weight, bias = (*args(node), None)[:3]
    if not constants.is_constant(weight):
        return _computed_weight(ctx, node, x, weight, bias)
    value = ctx.input(node, x, keep_order=True)
    found = weights.read(ctx, node, weight, 0, four=True, blocks=True)
    if value.order is not None and (value.order[0] != len(value.perm) - 1 or found.block):
        value = ctx.input(node, x)
    elif value.order is not None:
        columns = np.take(found.values, value.order[1], 1)
        found = Weight(found.name, columns, 0, found.scale, found.bits)
    value = ctx.relaid(node, Value(value.tensor, value.perm), layout.identity(len(value.perm)))
    return _fully_connected(ctx, node, value.tensor, found, bias)


def _fully_connected(ctx: Lowering, node: Node, x: Tensor, weight: Weight, bias: Node | None) -> Value:
    """FULLY_CONNECTED; its kernels for float times 4 bits forget the fused activation (LiteRT 2.3.0, without
    XNNPACK), which is an operation of its own there.
    """
    restored = ctx.numerics.restored and weight.scale is not None
    kernel = weights.restored(ctx, node, weight) if restored else weights.store(ctx, weight, lambda w: w, 0)
    biases = None if bias is None else weights.bias(ctx, node, bias, x, weight, None)
    stored = ctx.shape_of(node)
    made = ctx.result(node, stored)
    weights.check_multiplier(x, weight, made)
    hybrid = x.dtype == "float32" and kernel.dtype in ("int8", "int4")
    fused = ctx.fused_activation(node)
    apart = hybrid and kernel.dtype == "int4" and fused
    product = ctx.part(node, "product", stored, made) if apart else made
    ctx.draft.emit(
        "FULLY_CONNECTED", [x, kernel, biases], [product], "FullyConnectedOptions",
        keepNumDims=len(stored) != 2, asymmetricQuantizeInputs=hybrid and not weight.block,
        fusedActivationFunction=activation("" if apart else fused),
    )  # fmt: skip
    if apart:
        ctx.draft.emit(fused.upper(), [product], [made])
    return Value(made, layout.identity(len(stored)))


def _computed_weight(ctx: Lowering, node: Node, x: Node, weight: Node, bias: Node | None) -> Value:
    """A linear whose weight another node computes: BATCH_MATMUL and, in float, ADD."""
    if bias is not None and ctx.is_integer(node):
        raise Unsupported("its weight is computed at run time and it has a bias")
    made = ctx.result(node, ctx.shape_of(node))
    fused = ctx.fused_activation(node)
    product = made if bias is None and not fused else ctx.part(node, "product", made.shape, made)
    _batch_matmul(ctx, [ctx.input(node, x), ctx.input(node, weight)], product, flip=True, node=node)
    if bias is None and fused:
        ctx.draft.emit(fused.upper(), [product], [made])
    if bias is not None:
        shift = ctx.input(node, bias).tensor
        ctx.draft.emit(
            "ADD", [product, shift], [made], "AddOptions",
            fusedActivationFunction=activation(fused),
        )  # fmt: skip
    return Value(made, layout.identity(len(made.shape)))


@lowers(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(ctx: Lowering, node: Node) -> Value:
    """Vectors become matrices for the product; a transposed operand costs nothing (adjX, adjY)."""
    first, second = ctx.input(node, args(node)[0]), ctx.input(node, args(node)[1])
    shape = ctx.shape_of(node)
    row, column = len(first.perm) == 1, len(second.perm) == 1
    if row:
        first = Value(ctx.reshape(node, first.tensor, (1, *first.tensor.shape)), (0, 1))
    if column:
        second = Value(ctx.reshape(node, second.tensor, (*second.tensor.shape, 1)), (0, 1))
    full = (*shape, 1) if column else shape
    full = (*full[:-1], 1, full[-1]) if row else full
    made = ctx.result(node, shape)
    target = made if full == shape else ctx.part(node, "matrix", full, made)
    _batch_matmul(ctx, [first, second], target, flip=False, node=node)
    if target is not made:
        ctx.reshape(node, target, shape, made)
    return Value(made, layout.identity(len(shape)))


def _batch_matmul(ctx: Lowering, sides: list[Value], made: Tensor, *, flip: bool, node: Node) -> None:
    """`flip`: the second side is given as [..., columns, rows]."""
    (x, adj_x), (y, adj_y) = (_matrix(ctx, node, v) for v in sides)
    ctx.draft.emit(
        "BATCH_MATMUL", [x, y], [made], "BatchMatMulOptions",
        adjX=adj_x, adjY=adj_y != flip, asymmetricQuantizeInputs=False,
    )  # fmt: skip


def _matrix(ctx: Lowering, node: Node, value: Value) -> tuple[Tensor, bool]:
    """The tensor with its batch axes in order, and whether its last two axes are swapped."""
    rank = len(value.perm)
    plain = layout.identity(rank)
    swapped = (*plain[:-2], rank - 1, rank - 2)
    if value.perm == swapped and not np.isin(1, value.tensor.shape[-2:]):
        return value.tensor, True
    return ctx.relaid(node, value, plain).tensor, False


@lowers(aten.addmm.default)
def addmm(ctx: Lowering, node: Node) -> Value:
    """bias + x @ weight, as some exports spell a linear layer; only with constants, in float."""
    bias, x, weight = args(node)[:3]
    if node.kwargs or not constants.is_constant(weight) or not constants.is_constant(bias):
        raise Unsupported("addmm with computed weight, or with alpha and beta")
    if ctx.is_integer(node):
        raise Unsupported("addmm in integers; write it as a linear layer")
    array = ctx.array_of(weight).T.astype(np.float32)
    value = ctx.input(node, x, perm=(0, 1))
    found = Weight(str(weight.target), array, 0)
    return _fully_connected(ctx, node, value.tensor, found, bias)
