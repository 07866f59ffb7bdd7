"""Arithmetic of two operands, comparisons, selection, casts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from edgecomp.exporters import tflite_layout as layout
from edgecomp.exporters.tflite_check import LARGEST_TERM, check_scale
from edgecomp.exporters.tflite_file import Tensor, activation, type_of
from edgecomp.exporters.tflite_lower import Lowering, Value
from edgecomp.exporters.tflite_shape import common_layout
from edgecomp.exporters.tflite_table import Unsupported, args, argument, lowers

aten = torch.ops.aten


def operand(ctx: Lowering, node: Node, source: Any, perm: layout.Perm, dtype: str = "") -> Tensor:
    """One side of a broadcasting operation whose result is stored as `perm`; cast to `dtype` if given."""
    rank = len(perm)
    if not isinstance(source, Node) or source.op == "get_attr":
        array = ctx.array_of(source) if isinstance(source, Node) else np.array(source)
        if not isinstance(source, Node) and array.dtype == np.float64:
            array = array.astype(np.float32)
        if array.ndim and perm != layout.identity(rank):
            array = array.reshape((1,) * (rank - array.ndim) + array.shape).transpose(perm)
        return ctx.constant_operand(node, source, array, dtype)
    value = ctx.input(node, source)
    if len(value.perm) < rank and perm != layout.identity(rank):
        extra = (1,) * (rank - len(value.perm))
        wide_tensor = ctx.reshape(node, value.tensor, (*extra, *value.tensor.shape))
        value = Value(wide_tensor, layout.widened(value.perm, rank))
    elif len(value.perm) < rank:
        perm = layout.identity(len(value.perm))
    return cast(ctx, node, ctx.relaid(node, value, perm).tensor, dtype)


def cast(ctx: Lowering, node: Node, x: Tensor, dtype: str) -> Tensor:
    if dtype in ("", x.dtype) or x.quant is not None:
        return x
    made = Tensor(ctx.label(node, "cast"), x.shape, dtype)
    return ctx.draft.emit(
        "CAST", [x], [made], "CastOptions", inDataType=type_of(x.dtype), outDataType=type_of(dtype)
    )


def promoted(node: Node, sources: Sequence[Any]) -> str:
    """The dtype in which PyTorch computes a comparison or an arithmetic of these operands."""
    values = [s.meta["val"] if isinstance(s, Node) else s for s in sources]
    found = values[0].dtype if isinstance(values[0], torch.Tensor) else torch.get_default_dtype()
    if len(values) > 1:
        found = torch.result_type(values[0], values[1])
    if found.is_floating_point:
        return "float32"
    return "bool" if found is torch.bool else "int32"


def binary(
    ctx: Lowering, node: Node, code: str, table: str, *, fuses: bool = False, same_scale: bool = False
) -> Value:
    sources = args(node)[:2]
    perm = common_layout(ctx, node, sources)
    made = ctx.result(node, layout.stored_shape(ctx.shape_of(node), perm))
    dtype = promoted(node, sources)
    sides = [operand(ctx, node, s, perm, "" if made.quant is not None else dtype) for s in sources]
    if made.quant is not None and any(s.quant is None for s in sides):
        raise Unsupported(
            "it makes real numbers of integers, which only a float operation does; "
            "exclude its module from quantization"
        )
    if made.quant is not None and code in ("ADD", "SUB"):
        coarsest = max(float(s.quant.scale[0]) for s in sides if s.quant is not None)
        check_scale(coarsest, float(made.quant.scale[0]), LARGEST_TERM)
    if same_scale:
        sides = [ctx.requantized(node, s, made.quant) for s in sides]
    options: dict[str, Any] = (
        {"fusedActivationFunction": activation(ctx.fused_activation(node))} if fuses else {}
    )
    if code in ("ADD", "SUB"):
        options["potScaleInt16"] = False
    ctx.draft.emit(code, sides, [made], table, **options)
    return Value(made, perm)


@lowers(aten.add.Tensor)
def add(ctx: Lowering, node: Node) -> Value:
    _no_alpha(node)
    return binary(ctx, node, "ADD", "AddOptions", fuses=True)


@lowers(aten.sub.Tensor)
def sub(ctx: Lowering, node: Node) -> Value:
    _no_alpha(node)
    return binary(ctx, node, "SUB", "SubOptions", fuses=True)


def _no_alpha(node: Node) -> None:
    if node.kwargs.get("alpha", 1) != 1:
        raise Unsupported(f"alpha {node.kwargs['alpha']} between integers")


@lowers(aten.mul.Tensor)
def mul(ctx: Lowering, node: Node) -> Value:
    if promoted(node, args(node)[:2]) == "bool":
        return binary(ctx, node, "LOGICAL_AND", "LogicalAndOptions")
    return binary(ctx, node, "MUL", "MulOptions", fuses=True)


@lowers(aten.div.Tensor)
def div(ctx: Lowering, node: Node) -> Value:
    """True division: of integers, too, in float. The integer kernels stop at a divisor of zero steps, so
    what cannot be negative is kept one step above.
    """
    sources = args(node)[:2]
    perm = common_layout(ctx, node, sources)
    made = ctx.result(node, layout.stored_shape(ctx.shape_of(node), perm))
    sides = [operand(ctx, node, s, perm, "float32") for s in sources]
    if made.quant is not None:
        sides[1] = _above_zero(ctx, node, sources[1], sides[1])
    ctx.draft.emit("DIV", sides, [made], "DivOptions", fusedActivationFunction=0)
    return Value(made, perm)


_NEVER_NEGATIVE = {
    aten.relu.default, aten.relu6.default, aten.exp.default, aten.sqrt.default, aten.abs.default,
    aten.sigmoid.default, aten.softmax.int, aten.linalg_vector_norm.default,
}  # fmt: skip
_MOVES = {aten.expand.default, aten.reshape.default, aten.permute.default, aten.slice.Tensor, aten.select.int}


def _is_never_negative(node: Any) -> bool:
    if not isinstance(node, Node):
        return False
    if node.target is aten.clamp.default:
        low = argument(node, 1, "min")
        return isinstance(low, int | float) and low >= 0 or _is_never_negative(args(node)[0])
    return node.target in _NEVER_NEGATIVE or node.target in _MOVES and _is_never_negative(args(node)[0])


def _above_zero(ctx: Lowering, node: Node, source: Any, divisor: Tensor) -> Tensor:
    quant = divisor.quant
    if quant is None or divisor.data is not None:
        return divisor
    zero, limits = int(quant.zero_point[0]), np.iinfo(divisor.dtype)
    decided = ctx.quant_of(source) if isinstance(source, Node) else None
    narrow = decided is not None and decided.dtype == "int8" and int(decided.zero_point[0]) == -128
    if zero != limits.min and not narrow and not _is_never_negative(source):
        raise Unsupported(
            "integer kernels fail on a divisor of zero, and this one can be; "
            "exclude its module from quantization"
        )
    one = ctx.draft.constant(np.array(zero + 1, divisor.dtype), f"{node.name}:one", divisor.dtype, quant)
    made = ctx.part(node, "divisor", divisor.shape, divisor)
    return ctx.draft.emit("MAXIMUM", [divisor, one], [made], "MaximumMinimumOptions")


@lowers(aten.div.Tensor_mode)
def div_mode(ctx: Lowering, node: Node) -> Value:
    if node.kwargs.get("rounding_mode") != "floor" or ctx.is_integer(node):
        raise Unsupported(f"division with rounding_mode {node.kwargs.get('rounding_mode')!r}")
    return binary(ctx, node, "FLOOR_DIV", "FloorDivOptions")


@lowers(aten.remainder.Scalar, aten.remainder.Tensor)
def remainder(ctx: Lowering, node: Node) -> Value:
    if ctx.is_integer(node):
        raise Unsupported("remainder of quantized values")
    return binary(ctx, node, "FLOOR_MOD", "FloorModOptions")


@lowers(aten.pow.Tensor_Tensor)
def power(ctx: Lowering, node: Node) -> Value:
    if ctx.is_integer(node):
        raise Unsupported("power with a computed exponent, of quantized values")
    return binary(ctx, node, "POW", "PowOptions")


@lowers(aten.maximum.default)
def maximum(ctx: Lowering, node: Node) -> Value:
    return binary(ctx, node, "MAXIMUM", "MaximumMinimumOptions", same_scale=True)


@lowers(aten.minimum.default)
def minimum(ctx: Lowering, node: Node) -> Value:
    return binary(ctx, node, "MINIMUM", "MaximumMinimumOptions", same_scale=True)


_COMPARISONS = {
    "eq": ("EQUAL", "EqualOptions"),
    "ne": ("NOT_EQUAL", "NotEqualOptions"),
    "lt": ("LESS", "LessOptions"),
    "le": ("LESS_EQUAL", "LessEqualOptions"),
    "gt": ("GREATER", "GreaterOptions"),
    "ge": ("GREATER_EQUAL", "GreaterEqualOptions"),
}


@lowers(*(getattr(getattr(aten, name), kind) for name in _COMPARISONS for kind in ("Tensor", "Scalar")))
def compare(ctx: Lowering, node: Node) -> Value:
    code, table = _COMPARISONS[str(node.target).split(".")[1]]
    sources = args(node)[:2]
    perm = common_layout(ctx, node, sources)
    dtype = promoted(node, sources)
    if dtype == "bool" and code not in ("EQUAL", "NOT_EQUAL"):
        dtype = "int32"
    made = ctx.result(node, layout.stored_shape(ctx.shape_of(node), perm))
    ctx.draft.emit(code, [operand(ctx, node, s, perm, dtype) for s in sources], [made], table)
    return Value(made, perm)


@lowers(aten.logical_and.default, aten.bitwise_and.Tensor)
def logical_and(ctx: Lowering, node: Node) -> Value:
    return _logical(ctx, node, "LOGICAL_AND", "LogicalAndOptions")


@lowers(aten.logical_or.default, aten.bitwise_or.Tensor)
def logical_or(ctx: Lowering, node: Node) -> Value:
    return _logical(ctx, node, "LOGICAL_OR", "LogicalOrOptions")


@lowers(aten.logical_not.default, aten.bitwise_not.default)
def logical_not(ctx: Lowering, node: Node) -> Value:
    return _logical(ctx, node, "LOGICAL_NOT", "LogicalNotOptions")


def _logical(ctx: Lowering, node: Node, code: str, table: str) -> Value:
    if any(isinstance(a, Node) and a.meta["val"].dtype is not torch.bool for a in args(node)):
        raise Unsupported("logic on numbers; compare them first")
    perm = common_layout(ctx, node, args(node))
    made = ctx.result(node, layout.stored_shape(ctx.shape_of(node), perm))
    ctx.draft.emit(code, [operand(ctx, node, a, perm, "bool") for a in args(node)], [made], table)
    return Value(made, perm)


@lowers(aten.where.self)
def where(ctx: Lowering, node: Node) -> Value:
    """SELECT_V2: the condition is boolean, both sides on the scale of the result."""
    perm = common_layout(ctx, node, args(node)[:3])
    made = ctx.result(node, layout.stored_shape(ctx.shape_of(node), perm))
    dtype = "" if made.quant is not None else made.dtype
    sides = [ctx.requantized(node, operand(ctx, node, s, perm, dtype), made.quant) for s in args(node)[1:3]]
    condition = operand(ctx, node, args(node)[0], perm, "bool")
    ctx.draft.emit("SELECT_V2", [condition, *sides], [made], "SelectV2Options")
    return Value(made, perm)


@lowers(aten._to_copy.default)
def to_copy(ctx: Lowering, node: Node) -> Value:
    """A change of dtype. Booleans become quantized values without touching a float."""
    source = args(node)[0]
    value = ctx.input(node, source, as_stored=not ctx.is_integer(node))
    tensor, dtype = value.tensor, ctx.dtype_of(node)
    if ctx.is_integer(node) and tensor.dtype == "bool":
        return _bool_to_quantized(ctx, node, value)
    if ctx.is_integer(node) and tensor.quant is None:
        raise Unsupported(
            "it makes real numbers of integers, which only a float operation does; "
            "exclude its module from quantization"
        )
    if tensor.quant is not None:
        if dtype == "float32" and ctx.is_integer(node):
            return value
        tensor = ctx.dequantize(node, tensor)
    return Value(cast(ctx, node, tensor, dtype), value.perm, value.order)


def _bool_to_quantized(ctx: Lowering, node: Node, value: Value) -> Value:
    made = ctx.result(node, value.tensor.shape)
    if made.quant is None:
        raise Unsupported("the plan has no scale for it")
    limits = np.iinfo(made.dtype)
    steps = [int(np.rint(v / made.quant.scale[0]) + made.quant.zero_point[0]) for v in (1.0, 0.0)]
    sides = [
        ctx.draft.constant(
            np.array(np.clip(s, limits.min, limits.max), made.dtype),
            f"{node.name}:{n}",
            made.dtype,
            made.quant,
        )
        for s, n in zip(steps, ("true", "false"), strict=True)
    ]
    ctx.draft.emit("SELECT_V2", [value.tensor, *sides], [made], "SelectV2Options")
    return Value(made, value.perm)


@lowers(aten._assert_tensor_metadata.default)
def checked_metadata(ctx: Lowering, node: Node) -> list[Value]:
    return []


def scalar_argument(node: Node, index: int, name: str, default: float) -> float:
    found = argument(node, index, name, default)
    if isinstance(found, Node):
        raise Unsupported(f"{name} is computed at run time")
    return float(default if found is None else found)
