"""Weights and biases: from the plan's integers, or in the storage that a float target asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch.fx import Node

from edgecomp.exporters import tflite_numerics as numerics_of
from edgecomp.exporters.tflite_check import LARGEST_PRODUCT, check_scale
from edgecomp.exporters.tflite_file import Quant, Tensor
from edgecomp.exporters.tflite_lower import Lowering
from edgecomp.exporters.tflite_table import Unsupported
from edgecomp.graph import constants
from edgecomp.numerics import affine
from edgecomp.spec import Problem, QuantSpec

# A weight with fewer elements is stored as float32 in a weight-only target: it would save nothing.
_WORTH_QUANTIZING = 64
# With fewer outputs LiteRT's kernel without XNNPACK reads block scales as if there were none (2.3.0).
_FEWEST_ROWS = 4
_LARGEST_ACCUMULATOR = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight in torch's order. `values`: float32, or integers with `scale` [1] or [channels].

    `bits`: 32 (float), 8 or 4. `axis`: the output channels in torch's order. `block`: input channels that
    share a scale (`scale` is then [channels, blocks]), or 0. `zero`: zero points like `scale`, or None.
    """

    name: str
    values: np.ndarray
    axis: int
    scale: np.ndarray | None = None
    bits: int = 32
    block: int = 0
    zero: np.ndarray | None = None

    @property
    def channels(self) -> int:
        return int(self.values.shape[self.axis])

    def split(self, groups: int, group: int, axis: int) -> Weight:
        """One group's part along `axis`; its scales follow when the axis is that of the channels."""
        size = self.values.shape[axis] // groups
        part = slice(group * size, (group + 1) * size)
        values = np.take(self.values, range(part.start, part.stop), axis)
        scale = self.scale
        if scale is not None and axis == self.axis and scale.size > 1:
            scale = scale[part]
        return Weight(f"{self.name}:{group}", values, self.axis, scale, self.bits)

    def taken(self, order: np.ndarray | None) -> Weight:
        """Output channels in another order."""
        if order is None:
            return self
        scale = self.scale
        if scale is not None and scale.shape[0] == len(order):
            scale = scale[order]
        values = np.take(self.values, order, self.axis)
        return Weight(self.name, values, self.axis, scale, self.bits, self.block)


def read(
    ctx: Lowering,
    node: Node,
    source: Node,
    axis: int,
    *,
    hybrid: bool = True,
    four: bool = False,
    blocks: bool = False,
) -> Weight:
    """The weight that `node` uses. Kernels for float activations: `hybrid` with 8-bit weights, `four` with
    4-bit ones on one scale a channel, `blocks` with 4-bit ones on a scale for each block of a channel.
    """
    if not constants.is_constant(source):
        raise Unsupported("its weight is computed at run time")
    name = str(source.target)
    if ctx.is_integer(node):
        return _planned(ctx, name, axis)
    array = ctx.array_of(source).astype(np.float32)
    excluded = ctx.stored_plan is not None and node.name in ctx.stored_plan.float_nodes
    wanted = {"int8": 8, "int4": 4}.get(ctx.numerics.weights, 32)
    if wanted == 32 or excluded or array.size < _WORTH_QUANTIZING:
        return Weight(name, array, axis)
    if not hybrid:
        _note(ctx, node, "float weights: no fast kernel takes integer weights with float activations")
        return Weight(name, array, axis)
    found = _planned_weight_only(ctx, name, axis, wanted, four, blocks)
    if found is not None:
        _note_wider(ctx, node, name, found)
        return _without_lowest(ctx, node, found)
    planned = ctx.stored_plan.weights.get(name) if ctx.stored_plan is not None else None
    if planned is not None and planned.spec.bits > 4 and wanted == 4:
        _note(ctx, node, f"8 bits a channel: TFLite's kernels take no groups of {planned.spec.bits} bits")
        return per_channel(name, array, axis, 8)
    if planned is not None and four:
        _note(ctx, node, "rounded again: TFLite takes groups of a multiple of 32 inputs, no zero points")
    fits = array.shape[0] >= _FEWEST_ROWS and array.shape[-1] % ctx.numerics.group_size == 0
    if wanted == 4 and blocks and fits:
        return in_blocks(name, array, ctx.numerics.group_size)
    if wanted == 4:
        _note(
            ctx, node, "8 bits: 4 need a linear layer with a multiple of group_size inputs, or a 4-bit plan"
        )
    return per_channel(name, array, axis, 8)


def _note_wider(ctx: Lowering, node: Node, name: str, weight: Weight) -> None:
    bits = ctx.stored_plan.weights[name].spec.bits if ctx.stored_plan is not None else weight.bits
    if bits != weight.bits:
        _note(ctx, node, f"{bits} bits are stored in {weight.bits}: TFLite holds 4 or 8")


def _without_lowest(ctx: Lowering, node: Node, weight: Weight) -> Weight:
    """4 bits from -7: LiteRT's kernels without XNNPACK (2.3.0) give wrong sums where a weight is -8."""
    lowest = int((weight.values == -8).sum()) if weight.bits == 4 and not ctx.numerics.restored else 0
    if not lowest:
        return weight
    _note(ctx, node, f"{lowest} integers of {weight.values.size} are -7, not -8: quantize with narrow: true")
    return replace(weight, values=np.maximum(weight.values, -7))


def _note(ctx: Lowering, node: Node, reason: str) -> None:
    ctx.notes.append(Problem(str(node.target), node.meta.get("module", ""), reason))


def _planned(ctx: Lowering, name: str, axis: int) -> Weight:
    """The integers of the plan, for an integer operation."""
    found = ctx.plan.weights.get(name)
    if found is None or found.values is None:
        raise Unsupported(f"the plan has no integers for its weight {name!r}")
    if found.spec.axis not in (None, axis) or found.spec.group_size:
        raise Unsupported(
            f"weight {name!r} is quantized along axis {found.spec.axis}, in groups of "
            f"{found.spec.group_size}; an integer kernel needs axis {axis} and no groups"
        )
    return Weight(name, found.values, axis, found.scale.reshape(-1), found.spec.bits)


def _planned_weight_only(
    ctx: Lowering, name: str, axis: int, bits: int, four: bool, blocks: bool
) -> Weight | None:
    """The integers of the plan where a kernel takes them as they are: rounding is decided once."""
    found = ctx.stored_plan.weights.get(name) if ctx.stored_plan is not None else None
    if found is None or found.values is None:
        return None
    stored = 4 if found.spec.bits <= 4 else 8
    block = found.spec.group_size or 0
    if ctx.numerics.restored and blocks and found.spec.axis in (None, axis):
        zero = found.zero_point if found.zero_point.any() else None
        scale = found.scale if block else found.scale.reshape(-1)
        return Weight(name, found.values, axis, scale, stored, block, zero)
    if stored != bits or found.zero_point.any():
        return None  # TFLite's kernels take no zero points of weights
    if block:
        fits = bits == 4 and blocks and block % 32 == 0
        return Weight(name, found.values, axis, found.scale, bits, block) if fits else None
    if found.spec.axis not in (None, axis) or (bits == 4 and not four):
        return None
    return Weight(name, found.values, axis, found.scale.reshape(-1), bits)


def per_channel(name: str, array: np.ndarray, axis: int, bits: int) -> Weight:
    """Round to nearest on symmetric min-max scales, one for each output channel."""
    spec = QuantSpec(bits=bits, symmetric=True, axis=axis, narrow=True)
    scale = affine.channel_scales(array, spec)
    steps = np.rint(array / affine.along(scale, axis, array.ndim))
    return Weight(name, np.clip(steps, spec.qmin, spec.qmax).astype(np.int8), axis, scale.reshape(-1), bits)


def in_blocks(name: str, array: np.ndarray, block: int) -> Weight:
    """[out, in] rounded to 4 bits in [-7, 7], one float16 scale for each `block` inputs of an output.

    Scales are rounded up to float16 first, and the weights on the rounded ones: nothing is clipped.
    """
    parts = array.reshape(array.shape[0], -1, block)
    exact = np.maximum(np.abs(parts).max(-1) / 7.0, np.finfo(np.float16).tiny)
    half = exact.astype(np.float16)
    scale = np.where(half < exact, np.nextafter(half, np.float16(np.inf)), half).astype(np.float32)
    values = np.clip(np.rint(parts / scale[..., None]), -7, 7).astype(np.int8)
    return Weight(name, values.reshape(array.shape), 0, scale, 4, block)


def store(
    ctx: Lowering, weight: Weight, arrange: Callable[[np.ndarray], np.ndarray], axis: int, four: bool = True
) -> Tensor:
    """The constant, its array rearranged for the kernel; `axis`: the channels in the rearranged array.

    `four`: whether the kernel reads 4-bit weights; else they take 8 bits each, with the same values.
    """
    array = arrange(weight.values)
    if weight.scale is None:
        return ctx.float_constant(array, weight.name)
    dtype = "int4" if weight.bits == 4 and four else "int8"
    if weight.bits > 8:
        raise Unsupported(f"weight {weight.name!r} has {weight.bits} bits; TFLite's kernels take 4 or 8")
    if weight.block:
        quant = Quant(weight.scale, np.zeros(weight.scale.shape, np.int64), axis, weight.block)
    else:
        scale = np.broadcast_to(weight.scale.astype(np.float32), (weight.channels,)).copy()
        quant = Quant(scale, np.zeros(scale.shape, np.int64), axis)
    return ctx.draft.constant(array.astype(np.int8), weight.name, dtype, quant)


def restored(ctx: Lowering, node: Node, weight: Weight) -> Tensor:
    """Integers [out, in] that a DEQUANTIZE makes float32 once, when the file is loaded.

    LiteRT's DEQUANTIZE (2.3.0) reads block scales as if there were one scale, so every block is stored as a
    channel of its own, [out * blocks, block], and the floats get their shape back afterwards.
    """
    if weight.scale is None:
        raise ValueError("a stored weight has scales")
    scale = np.ascontiguousarray(weight.scale, np.float32).reshape(-1)
    zero = np.zeros(scale.shape) if weight.zero is None else weight.zero.reshape(-1)
    rows = np.ascontiguousarray(weight.values, np.int8).reshape(len(scale), -1)
    dtype = "int4" if weight.bits == 4 else "int8"
    kernel = ctx.draft.constant(rows, weight.name, dtype, Quant(scale, zero.astype(np.int64), 0))
    whole = Tensor(ctx.label(node, "restored"), rows.shape, "float32")
    ctx.draft.emit("DEQUANTIZE", [kernel], [whole], "DequantizeOptions")
    return ctx.reshape(node, whole, weight.values.shape)


def check_multiplier(x: Tensor, weight: Weight, made: Tensor) -> None:
    """Raise Unsupported where the output's scale is far too fine for what the layer computes."""
    if x.quant is not None and made.quant is not None and weight.scale is not None:
        step = float(x.quant.scale[0]) * float(weight.scale.max())
        check_scale(step, float(made.quant.scale[0]), LARGEST_PRODUCT)


def bias(
    ctx: Lowering, node: Node, source: Node | None, x: Tensor, weight: Weight, order: np.ndarray | None
) -> Tensor:
    """The bias [channels] of a convolution or linear: float, or integers on the accumulator's scale.

    A missing bias becomes zeros: XNNPACK's integer convolutions want one.
    """
    name = str(source.target) if source is not None else f"{weight.name}:zero_bias"
    array = (
        np.zeros(weight.channels, np.float32) if source is None else ctx.array_of(source).astype(np.float32)
    )
    array = array if order is None or source is None else array[order]
    return store_bias(ctx, node, name, array, x, weight)


def store_bias(ctx: Lowering, node: Node, name: str, array: np.ndarray, x: Tensor, weight: Weight) -> Tensor:
    if not ctx.is_integer(node) or weight.scale is None or x.quant is None:
        return ctx.float_constant(array, name)
    scale = np.broadcast_to(weight.scale.astype(np.float32), array.shape)
    integers = numerics_of.bias_integers(array, x.quant.scale, scale)
    dtype = "int64" if x.dtype == "int16" else "int32"
    if dtype == "int32" and np.abs(integers).max(initial=0) > _LARGEST_ACCUMULATOR:
        channel = int(np.abs(integers).argmax())
        raise Unsupported(
            f"bias {name!r} is {array[channel]:g} in channel {channel}: {integers[channel]} steps of the "
            "accumulator's scale, more than int32 holds; raise the weight's scale there, or prune the channel"
        )
    quant = Quant(affine.bias_scales(x.quant.scale[:1], scale), np.zeros(scale.shape, np.int64), 0)
    return ctx.draft.constant(integers.astype(dtype), name, dtype, quant)
