"""Functions of one operand, element by element, and softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from edgecomp.exporters import tflite_layout as layout
from edgecomp.exporters import tflite_numerics as numerics_of
from edgecomp.exporters.tflite_file import Quant, Tensor, type_of
from edgecomp.exporters.tflite_lower import Lowering, Value
from edgecomp.exporters.tflite_math import scalar_argument
from edgecomp.exporters.tflite_table import Unsupported, args, argument, lowers

aten = torch.ops.aten

Function = Callable[[np.ndarray], np.ndarray]


def unary(ctx: Lowering, node: Node, code: str, table: str = "", **options: Any) -> Value:
    value = ctx.input(node, args(node)[0], keep_order=True)
    made = ctx.result(node, value.tensor.shape)
    ctx.draft.emit(code, [value.tensor], [made], table, **options)
    return Value(made, value.perm, value.order)


@lowers(aten.relu.default)
def relu(ctx: Lowering, node: Node) -> Value:
    return unary(ctx, node, "RELU")


@lowers(aten.relu6.default)
def relu6(ctx: Lowering, node: Node) -> Value:
    return unary(ctx, node, "RELU6")


@lowers(aten.leaky_relu.default)
def leaky_relu(ctx: Lowering, node: Node) -> Value:
    return unary(
        ctx, node, "LEAKY_RELU", "LeakyReluOptions", alpha=scalar_argument(node, 1, "negative_slope", 0.01)
    )


@lowers(aten.hardswish.default)
def hardswish(ctx: Lowering, node: Node) -> Value:
    if ctx.is_wide(node) or ctx.is_integer(node) and _is_finer(ctx, node):
        return by_table(ctx, node, lambda x: x * np.clip(x + 3, 0, 6) / 6)
    return unary(ctx, node, "HARD_SWISH", "HardSwishOptions")


def _is_finer(ctx: Lowering, node: Node) -> bool:
    """Is the output's scale so fine that HARD_SWISH does not prepare (from 128 times on)?"""
    before, after = ctx.input(node, args(node)[0], keep_order=True).tensor.quant, ctx.quant_of(node)
    return before is not None and after is not None and bool(before.scale[0] > 64 * after.scale[0])


@lowers(aten.gelu.default)
def gelu(ctx: Lowering, node: Node) -> Value:
    approximate = argument(node, 1, "approximate", "none") == "tanh"
    if ctx.is_wide(node):
        return by_table(ctx, node, _tanh_gelu if approximate else _erf_gelu)
    return unary(ctx, node, "GELU", "GeluOptions", approximate=approximate)


def _erf_gelu(x: np.ndarray) -> np.ndarray:
    return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()


def _tanh_gelu(x: np.ndarray) -> np.ndarray:
    return torch.nn.functional.gelu(torch.from_numpy(x), approximate="tanh").numpy()


@lowers(aten.exp.default)
def exp(ctx: Lowering, node: Node) -> Value:
    return unary(ctx, node, "EXP", "ExpOptions")


@lowers(aten.log.default)
def log(ctx: Lowering, node: Node) -> Value:
    """The 16-bit kernel interpolates too coarsely near zero, and old runtimes have none for int8."""
    if ctx.is_integer(node):
        return by_table(ctx, node, lambda x: np.log(np.maximum(x, 1e-30)))
    return unary(ctx, node, "LOG")


@lowers(aten.abs.default)
def absolute(ctx: Lowering, node: Node) -> Value:
    return unary(ctx, node, "ABS", "AbsOptions")


@lowers(aten.neg.default)
def neg(ctx: Lowering, node: Node) -> Value:
    """No runtime before 2025 negates int8; a product with -1 does it everywhere."""
    if not ctx.is_integer(node):
        return unary(ctx, node, "NEG", "NegOptions")
    value = ctx.input(node, args(node)[0], keep_order=True)
    made = ctx.result(node, value.tensor.shape)
    minus = ctx.constant_operand(node, -1.0, np.array(-1.0, np.float32))
    ctx.draft.emit("MUL", [value.tensor, minus], [made], "MulOptions", fusedActivationFunction=0)
    return Value(made, value.perm, value.order)


def by_table(ctx: Lowering, node: Node, function: Function) -> Value:
    """Any function of one quantized operand: GATHER from the table of its results, exactly rounded.

    index = int32(x) + 2^(bits-1), so that the lowest integer finds entry 0. Operand and result may differ
    in width.
    """
    value = ctx.input(node, args(node)[0], keep_order=True, any_width=True)
    x, made = value.tensor, ctx.result(node, value.tensor.shape, quant=ctx.quant_of(node))
    if x.quant is None or made.quant is None:
        raise Unsupported("the plan has no scale for its input or output")
    limits = np.iinfo(x.dtype)
    steps = np.arange(limits.min, limits.max + 1)
    real = ((steps - x.quant.zero_point[0]) * np.float64(x.quant.scale[0])).astype(np.float32)
    with np.errstate(all="ignore"):
        results = np.nan_to_num(function(real).astype(np.float32), nan=0.0)
    entries = numerics_of.quantized(results, made.quant, made.dtype)
    table = ctx.draft.constant(entries, f"{node.name}:table", made.dtype, made.quant)
    wide, index = (Tensor(ctx.label(node, part), x.shape, "int32") for part in ("wide", "index"))
    ctx.draft.emit(
        "CAST", [x], [wide], "CastOptions", inDataType=type_of(x.dtype), outDataType=type_of("int32")
    )
    offset = ctx.draft.constant(np.array(-limits.min, np.int32), "offset")
    ctx.draft.emit(
        "ADD", [wide, offset], [index], "AddOptions", fusedActivationFunction=0, potScaleInt16=False
    )
    ctx.draft.emit("GATHER", [table, index], [made], "GatherOptions", axis=0, batchDims=0)
    return Value(made, value.perm, value.order)


def _float_or_table(target: Any, function: Function, code: str, table: str = "") -> None:
    """Register an operation that has a float kernel, and a table for integers."""

    @lowers(target)
    def lower(ctx: Lowering, node: Node) -> Value:
        if ctx.is_integer(node):
            return by_table(ctx, node, function)
        return unary(ctx, node, code, table)


_float_or_table(aten.sqrt.default, lambda x: np.sqrt(np.maximum(x, 0)), "SQRT")
_float_or_table(aten.sin.default, np.sin, "SIN")
_float_or_table(aten.cos.default, np.cos, "COS", "CosOptions")
_float_or_table(aten.floor.default, np.floor, "FLOOR")
_float_or_table(aten.ceil.default, np.ceil, "CEIL")
_float_or_table(aten.round.default, np.rint, "ROUND")
_float_or_table(aten.sign.default, np.sign, "SIGN", "SignOptions")


@lowers(aten.rsqrt.default)
def rsqrt(ctx: Lowering, node: Node) -> Value:
    """The int8 kernel stops the inference on a value below zero: used where there is none."""
    if ctx.is_integer(node):
        x = ctx.input(node, args(node)[0], keep_order=True).tensor
        if x.quant is None or int(x.quant.zero_point[0]) != np.iinfo(x.dtype).min:
            return by_table(ctx, node, lambda v: np.where(v > 0, 1 / np.sqrt(np.maximum(v, 1e-30)), np.inf))
    return unary(ctx, node, "RSQRT")


@lowers(aten.pow.Tensor_Scalar)
def power(ctx: Lowering, node: Node) -> Value:
    exponent = scalar_argument(node, 1, "exponent", 1.0)
    if ctx.is_integer(node):
        return by_table(ctx, node, lambda x: np.power(x, exponent))
    value = ctx.input(node, args(node)[0])
    if value.tensor.dtype != "float32":
        raise Unsupported("power of integers")
    made = ctx.result(node, value.tensor.shape)
    number = ctx.draft.constant(np.array(exponent, np.float32), f"{node.name}:exponent")
    ctx.draft.emit("POW", [value.tensor, number], [made], "PowOptions")
    return Value(made, value.perm)


def _composed(target: Any, function: Function, *steps: tuple[str, str, float | None, bool]) -> None:
    """Register a function made of float steps (code, options, constant or None, constant first)."""

    @lowers(target)
    def lower(ctx: Lowering, node: Node) -> Value:
        if ctx.is_integer(node):
            return by_table(ctx, node, function)
        value = ctx.input(node, args(node)[0])
        x = value.tensor
        for code, table, number, first in steps:
            made = (
                ctx.result(node, x.shape)
                if code == steps[-1][0]
                else ctx.part(node, code.lower(), x.shape, x)
            )
            inputs: list[Tensor | None] = [x]
            if number is not None:
                constant = ctx.draft.constant(np.array(number, np.float32), f"{node.name}:{number:g}")
                inputs = [constant, x] if first else [x, constant]
            x = ctx.draft.emit(code, inputs, [made], table)
        return Value(x, value.perm)


_composed(aten.log1p.default, np.log1p, ("ADD", "AddOptions", 1.0, False), ("LOG", "", None, False))
_composed(aten.expm1.default, np.expm1, ("EXP", "ExpOptions", None, False), ("SUB", "SubOptions", 1.0, False))
_composed(aten.reciprocal.default, lambda x: 1 / x, ("DIV", "DivOptions", 1.0, True))


def _prescribed(ctx: Lowering, node: Node, code: str) -> Value:
    """An operation whose integer kernels insist on one output scale."""
    value = ctx.input(node, args(node)[0], keep_order=True)
    made = ctx.result(node, value.tensor.shape, quant=_prescription(ctx, node, code))
    ctx.draft.emit(code, [value.tensor], [made])
    return Value(made, value.perm, value.order)


def _prescription(ctx: Lowering, node: Node, code: str) -> Quant | None:
    if not ctx.is_integer(node):
        return None
    dtype = ctx.integer_dtype(node)
    found = numerics_of.FIXED.get((code, dtype))
    if found is None:
        raise Unsupported(f"{code} has no kernel for {dtype}")
    return found


@lowers(aten.sigmoid.default)
def sigmoid(ctx: Lowering, node: Node) -> Value:
    return _prescribed(ctx, node, "LOGISTIC")


@lowers(aten.tanh.default)
def tanh(ctx: Lowering, node: Node) -> Value:
    return _prescribed(ctx, node, "TANH")


@lowers(aten.softmax.int, aten._softmax.default)
def softmax(ctx: Lowering, node: Node) -> Value:
    return _over_last_axis(ctx, node, "SOFTMAX", "SoftmaxOptions", beta=1.0)


@lowers(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(ctx: Lowering, node: Node) -> Value:
    return _over_last_axis(ctx, node, "LOG_SOFTMAX", "LogSoftmaxOptions")


def _over_last_axis(ctx: Lowering, node: Node, code: str, table: str, **options: Any) -> Value:
    """TFLite's softmax runs over the last stored axis: for NHWC that is PyTorch's axis 1."""
    value = ctx.input(node, args(node)[0])
    rank = len(value.perm)
    dim = int(args(node)[1]) % rank
    if value.perm[-1] != dim:
        value = ctx.relaid(node, value, (*(a for a in range(rank) if a != dim), dim))
    made = ctx.result(node, value.tensor.shape, quant=_prescription(ctx, node, code))
    ctx.draft.emit(code, [value.tensor], [made], table, **options)
    return Value(made, value.perm)


@lowers(aten.clamp.default, aten.hardtanh.default)
def clamp(ctx: Lowering, node: Node) -> Value:
    """MAXIMUM and MINIMUM with constants; in integers on the scale of the result, which clips as well."""
    low, high = argument(node, 1, "min", None), argument(node, 2, "max", None)
    if node.target is aten.hardtanh.default:
        low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    if isinstance(low, Node) or isinstance(high, Node):
        raise Unsupported("clamp with computed limits")
    value = ctx.input(node, args(node)[0], any_width=True)
    quant = ctx.quant_of(node) if ctx.is_integer(node) else None
    x = ctx.requantized(node, value.tensor, quant)
    for code, limit in (("MAXIMUM", low), ("MINIMUM", high)):
        if limit is None or math.isinf(limit):
            continue
        number = np.array(limit, np.float32 if x.dtype == "float32" or quant else x.dtype)
        if quant is not None:
            number = numerics_of.quantized(number, quant, x.dtype)
        made = Tensor(ctx.label(node, code.lower()), x.shape, x.dtype, quant)
        constant = ctx.draft.constant(number, f"{node.name}:{limit:g}", x.dtype, quant)
        x = ctx.draft.emit(code, [x, constant], [made], "MaximumMinimumOptions")
    return Value(x, value.perm)


@lowers(aten.elu.default)
def elu(ctx: Lowering, node: Node) -> Value:
    """scale * (x if x > 0 else alpha * (exp(input_scale * x) - 1)); plain ELU has a kernel of its own."""
    alpha, scale, inner = (
        scalar_argument(node, i, name, 1.0) for i, name in ((1, "alpha"), (2, "scale"), (3, "input_scale"))
    )
    plain = (alpha, scale, inner) == (1.0, 1.0, 1.0)
    if ctx.is_integer(node) and not (plain and not ctx.is_wide(node)):
        return by_table(
            ctx, node, lambda x: scale * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0) * inner))
        )
    if plain:
        return unary(ctx, node, "ELU")
    return _scaled_elu(ctx, node, alpha, scale, inner)


def _scaled_elu(ctx: Lowering, node: Node, alpha: float, scale: float, inner: float) -> Value:
    """scale * relu(x) + scale * alpha * (exp(inner * min(x, 0)) - 1), in float."""
    value = ctx.input(node, args(node)[0])
    x = value.tensor

    def step(
        code: str, table: str, a: Tensor, b: float | Tensor | None, result: Tensor | None = None
    ) -> Tensor:
        other = ctx.draft.constant(np.array(b, np.float32), "number") if isinstance(b, float) else b
        made = result or ctx.part(node, code.lower(), x.shape, x)
        return ctx.draft.emit(code, [a] if other is None else [a, other], [made], table)

    positive = step("MUL", "MulOptions", step("RELU", "", x, None), scale)
    below = step("MUL", "MulOptions", step("MINIMUM", "MaximumMinimumOptions", x, 0.0), inner)
    power = step("SUB", "SubOptions", step("EXP", "ExpOptions", below, None), 1.0)
    negative = step("MUL", "MulOptions", power, scale * alpha)
    return Value(step("ADD", "AddOptions", positive, negative, ctx.result(node, x.shape)), value.perm)


@lowers(aten.prelu.default)
def prelu(ctx: Lowering, node: Node) -> Value:
    """The slope has one value, or one for each channel, which is PyTorch's axis 1."""
    value = ctx.input(node, args(node)[0])
    rank = len(value.perm)
    if rank > 2:
        value = ctx.relaid(node, value, layout.channels_last(rank))
    slope = ctx.array_of(args(node)[1])
    channels = value.tensor.shape[-1] if rank > 1 else 1
    wide = np.broadcast_to(slope.reshape(-1), (channels,)).reshape((1,) * max(rank - 2, 0) + (channels,))
    alpha = ctx.constant_operand(node, args(node)[1], np.ascontiguousarray(wide))
    made = ctx.result(node, value.tensor.shape)
    if made.dtype == "int16":
        return _prelu16(ctx, node, value, alpha, made, wide)
    if made.quant is not None:
        return _prelu8(ctx, node, value, alpha, made, wide)
    ctx.draft.emit("PRELU", [value.tensor, alpha], [made])
    return Value(made, value.perm)


def _prelu8(ctx: Lowering, node: Node, value: Value, alpha: Tensor, made: Tensor, slope: np.ndarray) -> Value:
    """max(1 * x, slope * x), min where slopes are above 1, a sum of parts where some are: all on one scale.

    LiteRT's PRELU rounds twice in fixed point, in every set of kernels: half a percent of results go the
    other way. A product is rounded once; rounding keeps order, so the larger of the rounded is the rounded
    larger one, and of the parts above and below zero one is zero. (QUANTIZE would not do for 1 * x: XNNPACK
    keeps 8 fractional bits of the ratio of scales.)
    """
    one = ctx.constant_operand(node, 1.0, np.array(1.0, np.float32))
    above = below = value.tensor
    if slope.min() < 1 < slope.max():
        above, below = (_clipped(ctx, node, value.tensor, code) for code in ("MAXIMUM", "MINIMUM"))
    sides = []
    for what, x, factor in (("plain", above, one), ("scaled", below, alpha)):
        sides.append(ctx.part(node, what, made.shape, made))
        ctx.draft.emit("MUL", [x, factor], [sides[-1]], "MulOptions", fusedActivationFunction=0)
    if above is not below:
        ctx.draft.emit("ADD", sides, [made], "AddOptions", fusedActivationFunction=0, potScaleInt16=False)
    else:
        code = "MINIMUM" if slope.max() > 1 else "MAXIMUM"
        ctx.draft.emit(code, sides, [made], "MaximumMinimumOptions")
    return Value(made, value.perm)


def _clipped(ctx: Lowering, node: Node, x: Tensor, code: str) -> Tensor:
    """The larger or smaller of a quantized value and zero, on its own scale."""
    if x.quant is None:
        raise Unsupported("the plan has no scale for its input")
    zero = np.array(x.quant.zero_point[0], x.dtype)
    constant = ctx.draft.constant(zero, f"{node.name}:zero", x.dtype, x.quant)
    made = ctx.part(node, code.lower(), x.shape, x)
    return ctx.draft.emit(code, [x, constant], [made], "MaximumMinimumOptions")


def _prelu16(
    ctx: Lowering, node: Node, value: Value, alpha: Tensor, made: Tensor, slope: np.ndarray
) -> Value:
    """max(x, slope * x): LiteRT's 16-bit PRELU rescales wrongly (2.3.0). A slope above 1 would need min."""
    if slope.max() > 1:
        raise Unsupported("a slope above 1 with 16-bit activations; exclude its module from quantization")
    scaled = ctx.part(node, "scaled", made.shape, made)
    ctx.draft.emit("MUL", [value.tensor, alpha], [scaled], "MulOptions", fusedActivationFunction=0)
    same = ctx.requantized(node, value.tensor, made.quant)
    ctx.draft.emit("MAXIMUM", [same, scaled], [made], "MaximumMinimumOptions")
    return Value(made, value.perm)
