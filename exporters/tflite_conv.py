"""Convolutions: CONV_2D, DEPTHWISE_CONV_2D, TRANSPOSE_CONV. One dimension is lowered as two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from edgecomp.exporters import tflite_layout as layout
from edgecomp.exporters import tflite_weights as weights
from edgecomp.exporters.tflite_file import Tensor, activation, padding
from edgecomp.exporters.tflite_lower import Lowering, Value
from edgecomp.exporters.tflite_table import Unsupported, args, lowers, pair
from edgecomp.exporters.tflite_weights import Weight

aten = torch.ops.aten

Pads = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Window:
    """How a kernel slides over the two spatial axes; `pads`: (before, after) for height and width."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: Pads

    def same(self, size: tuple[int, int]) -> bool:
        """Is this what TFLite calls SAME for an input of `size`?"""
        return all(
            same_padding(n, k, s, d) == self._needed(i, n)
            for i, (n, k, s, d) in enumerate(zip(size, self.kernel, self.stride, self.dilation, strict=True))
        )

    def _needed(self, axis: int, size: int) -> tuple[int, int]:
        """Padding that is read: rows at the end that no window reaches do not count."""
        before, after = self.pads[axis]
        span = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        count = (size + before + after - span) // self.stride[axis] + 1
        read = (count - 1) * self.stride[axis] + span
        return before, max(read - size - before, 0)

    def trimmed(self, size: tuple[int, int]) -> Pads:
        return self._needed(0, size[0]), self._needed(1, size[1])

    @property
    def padded(self) -> bool:
        return any(p for axis in self.pads for p in axis)


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """(before, after) of TensorFlow's SAME: the output has ceil(size / stride) elements."""
    span = dilation * (kernel - 1) + 1
    total = max((math.ceil(size / stride) - 1) * stride + span - size, 0)
    return total // 2, total - total // 2


def pad_spatial(ctx: Lowering, node: Node, x: Tensor, pads: Pads, value: float | None = None) -> Tensor:
    """PAD of the two spatial axes of an NHWC tensor with zero, or PADV2 with another value."""
    widths = np.array([(0, 0), *pads, (0, 0)], np.int32)
    stored = tuple(int(s + w.sum()) for s, w in zip(x.shape, widths, strict=True))
    made = ctx.part(node, "padded", stored, x)
    amounts = ctx.draft.constant(widths, "paddings")
    if value is None:
        return ctx.draft.emit("PAD", [x, amounts], [made], "PadOptions")
    fill = np.array(value, np.float32)
    if x.quant is not None:
        fill = np.array(np.iinfo(x.dtype).min if value < 0 else x.quant.zero_point[0], x.dtype)
    filler = ctx.draft.constant(fill, f"{node.name}:fill", x.dtype, x.quant)
    return ctx.draft.emit("PADV2", [x, amounts, filler], [made], "PadV2Options")


def _arguments(node: Node) -> tuple[Any, Any, Any, Any, Any, Any, int]:
    defaults = (None, None, None, 1, 0, 1, 1)
    return (*args(node), *defaults[len(args(node)) :])


@lowers(aten.conv2d.default)
def conv2d(ctx: Lowering, node: Node) -> Value:
    x, weight, bias, stride, pad, dilation, groups = _arguments(node)
    pad, source = pair(pad), x
    pads: Pads = ((pad[0], pad[0]), (pad[1], pad[1]))
    absorbed = _padding_before(ctx, x)
    if absorbed is not None:
        source, extra = absorbed
        pads = _added(pads, extra)
    value = ctx.input(node, source, perm=layout.channels_last(4))
    kernel = tuple(weight.meta["val"].shape[2:])
    window = Window(kernel, pair(stride), pair(dilation), pads)
    tensor = convolve(ctx, node, value.tensor, weight, bias, window, groups, four_dims=True)
    order = _order_for_user(ctx, node)
    return Value(tensor, layout.channels_last(4), None if order is None else (1, order))


def _added(pads: Pads, extra: Pads) -> Pads:
    rows, columns = (
        (before + more, after + rest) for (before, after), (more, rest) in zip(pads, extra, strict=True)
    )
    return rows, columns


@lowers(aten.conv1d.default)
def conv1d(ctx: Lowering, node: Node) -> Value:
    """[N, C, L] is [N, 1, L, C] to CONV_2D."""
    x, weight, bias, stride, pad, dilation, groups = _arguments(node)
    value = ctx.input(node, x, perm=layout.channels_last(3))
    batch, length, channels = value.tensor.shape
    flat = ctx.reshape(node, value.tensor, (batch, 1, length, channels))
    one = [pair(v)[0] for v in (stride, pad, dilation)]
    window = Window((1, weight.meta["val"].shape[2]), (1, one[0]), (1, one[2]), ((0, 0), (one[1], one[1])))
    tensor = convolve(ctx, node, flat, weight, bias, window, groups, four_dims=False)
    stored = (tensor.shape[0], tensor.shape[2], tensor.shape[3])
    return Value(ctx.reshape(node, tensor, stored), layout.channels_last(3))


def convolve(
    ctx: Lowering,
    node: Node,
    x: Tensor,
    source: Node,
    bias: Node | None,
    window: Window,
    groups: int,
    four_dims: bool,
) -> Tensor:
    """An NHWC tensor through a convolution with the padding that fits; returns NHWC."""
    depthwise = groups == x.shape[-1] and groups > 1
    weight = weights.read(ctx, node, source, 0, hybrid=not depthwise, four=not depthwise)
    if weight.values.ndim == 3:
        weight = Weight(weight.name, weight.values[:, :, None, :], 0, weight.scale, weight.bits)
    order = _order_for_user(ctx, node) if four_dims else None
    weight = weight.taken(order)
    size = (x.shape[1], x.shape[2])
    mode = "SAME" if window.same(size) else "VALID"
    if mode == "VALID" and window.padded:
        x = pad_spatial(ctx, node, x, window.trimmed(size))
    shape = ctx.shape_of(node)
    stored = (shape[0], shape[2], shape[3], shape[1]) if four_dims else (shape[0], 1, shape[2], shape[1])
    made = ctx.result(node, stored)
    options = {
        "padding": padding(mode),
        "strideH": window.stride[0],
        "strideW": window.stride[1],
        "dilationHFactor": window.dilation[0],
        "dilationWFactor": window.dilation[1],
        "fusedActivationFunction": activation(ctx.fused_activation(node)),
    }
    weights.check_multiplier(x, weight, made)
    biases = weights.bias(ctx, node, bias, x, weight, order)
    if depthwise:
        packed = x.dtype != "int16"  # 4-bit weights give garbage there (LiteRT 2.3.0)
        kernel = weights.store(ctx, weight, lambda w: w.transpose(1, 2, 3, 0), 3, four=packed)
        options["depthMultiplier"] = shape[1] // groups
        return ctx.draft.emit(
            "DEPTHWISE_CONV_2D", [x, kernel, biases], [made], "DepthwiseConv2DOptions", **options
        )
    kernel = weights.store(ctx, weight, lambda w: w.transpose(0, 2, 3, 1), 0)
    return ctx.draft.emit("CONV_2D", [x, kernel, biases], [made], "Conv2DOptions", **options)


def _padding_before(ctx: Lowering, x: Node) -> tuple[Node, Pads] | None:
    """(its input, pads) when x is a zero padding of height and width: the convolution can do it itself."""
    if x.target is not aten.constant_pad_nd.default or ctx.is_integer(x) != ctx.is_integer(args(x)[0]):
        return None
    widths = list(args(x)[1])
    if (args(x)[2] if len(args(x)) > 2 else 0) or len(widths) > 4 or min(widths) < 0:
        return None
    widths += [0] * (4 - len(widths))
    return args(x)[0], ((widths[2], widths[3]), (widths[0], widths[1]))


def _order_for_user(ctx: Lowering, node: Node) -> np.ndarray | None:
    """Output channels as a following pixel shuffle wants them, so that no data has to move."""
    final = ctx.final(node)
    users = list(final.users)
    if len(users) != 1 or users[0].target is not aten.pixel_shuffle.default or ctx.is_wide(users[0]):
        return None
    factor = int(args(users[0])[1])
    return shuffle_order(ctx.shape_of(node)[1], factor)


def shuffle_order(channels: int, factor: int) -> np.ndarray:
    """DEPTH_TO_SPACE reads channels as (row, column, c); pixel_shuffle as (c, row, column)."""
    return np.arange(channels).reshape(-1, factor, factor).transpose(1, 2, 0).reshape(-1)


@lowers(aten.conv_transpose2d.input)
def conv_transpose2d(ctx: Lowering, node: Node) -> Value:
    """Padding is a crop of the full result, unless TFLite's SAME crops the same."""
    defaults = (None, None, None, 1, 0, 0, 1, 1)
    given: tuple[Any, ...] = (*args(node), *defaults[len(args(node)) :])
    x, weight, bias, stride, pad, extra, groups, dilation = given
    value = ctx.input(node, x, perm=layout.channels_last(4))
    kernel = weights.read(ctx, node, weight, 1, hybrid=False)
    kernel = _dilated(kernel, pair(dilation))
    spots = _Deconvolution(pair(stride), pair(pad), pair(extra), kernel.values.shape[2:])
    order = list(range(int(groups)))
    if len(order) == 1:
        return Value(_deconvolve(ctx, node, value.tensor, kernel, bias, spots, None), layout.channels_last(4))
    parts = split_channels(ctx, node, value.tensor, len(order))
    outs = [
        _deconvolve(ctx, node, part, kernel.split(len(order), g, 0), bias, spots, (g, len(order)))
        for g, part in zip(order, parts, strict=True)
    ]
    shape = ctx.shape_of(node)
    made = ctx.result(node, (shape[0], shape[2], shape[3], shape[1]))
    ctx.draft.emit("CONCATENATION", outs, [made], "ConcatenationOptions", axis=3, fusedActivationFunction=0)
    return Value(made, layout.channels_last(4))


@dataclass(frozen=True)
class _Deconvolution:
    stride: tuple[int, int]
    pad: tuple[int, int]
    extra: tuple[int, int]
    kernel: tuple[int, ...]

    def full(self, size: tuple[int, int]) -> tuple[int, int]:
        """Spatial size before padding is cropped; `extra` rows (output_padding) only appear past it."""
        rows = [
            max((n - 1) * s + k, (n - 1) * s + k - p + e)
            for n, s, k, p, e in zip(size, self.stride, self.kernel, self.pad, self.extra, strict=True)
        ]
        return rows[0], rows[1]

    def out(self, size: tuple[int, int]) -> tuple[int, int]:
        rows = [
            (n - 1) * s + k - 2 * p + e
            for n, s, k, p, e in zip(size, self.stride, self.kernel, self.pad, self.extra, strict=True)
        ]
        return rows[0], rows[1]

    def same(self, size: tuple[int, int]) -> bool:
        out = self.out(size)
        return all(
            math.ceil(o / s) == n and same_padding(o, k, s, 1)[0] == p
            for n, o, k, s, p in zip(size, out, self.kernel, self.stride, self.pad, strict=True)
        )


def _deconvolve(
    ctx: Lowering,
    node: Node,
    x: Tensor,
    weight: Weight,
    bias: Node | None,
    spots: _Deconvolution,
    group: tuple[int, int] | None,
) -> Tensor:
    size = (x.shape[1], x.shape[2])
    same, out, channels = spots.same(size), spots.out(size), weight.values.shape[1]
    full = out if same else spots.full(size)
    if not same and any(e > p for e, p in zip(spots.extra, spots.pad, strict=True)):
        raise Unsupported(f"output_padding {spots.extra} is larger than padding {spots.pad}")
    part = None if group is None else slice(group[0] * channels, (group[0] + 1) * channels)
    array = (
        np.zeros(channels, np.float32)
        if bias is None
        else ctx.array_of(bias).astype(np.float32)[part or slice(None)]
    )
    name = f"{weight.name}:bias" if bias is None else str(bias.target)
    kernel = weights.store(ctx, weight, lambda w: w.transpose(1, 2, 3, 0), 0, four=False)
    biases = weights.store_bias(ctx, node, name, array, x, weight)
    whole = ctx.result(node, (x.shape[0], *full, channels))
    weights.check_multiplier(x, weight, whole)
    shape = ctx.numbers(whole.shape, "shape")
    ctx.draft.emit(
        "TRANSPOSE_CONV", [shape, kernel, x, biases], [whole], "TransposeConvOptions",
        padding=padding("SAME" if same else "VALID"), strideH=spots.stride[0], strideW=spots.stride[1],
    )  # fmt: skip
    if full == out:
        return whole
    made = ctx.result(node, (x.shape[0], *out, channels))
    begin = ctx.numbers([0, spots.pad[0], spots.pad[1], 0], "begin")
    return ctx.draft.emit("SLICE", [whole, begin, ctx.numbers(made.shape, "size")], [made], "SliceOptions")


def _dilated(weight: Weight, dilation: tuple[int, int]) -> Weight:
    """The kernel with zeros between its taps: TRANSPOSE_CONV knows no dilation."""
    if dilation == (1, 1):
        return weight
    i, o, height, width = weight.values.shape
    spread = np.zeros(
        (i, o, dilation[0] * (height - 1) + 1, dilation[1] * (width - 1) + 1), weight.values.dtype
    )
    spread[:, :, :: dilation[0], :: dilation[1]] = weight.values
    return Weight(weight.name, spread, weight.axis, weight.scale, weight.bits)


def split_channels(ctx: Lowering, node: Node, x: Tensor, groups: int) -> list[Tensor]:
    """The last axis in equal parts."""
    stored = (*x.shape[:-1], x.shape[-1] // groups)
    parts = [ctx.part(node, f"group{g}", stored, x) for g in range(groups)]
    axis = ctx.numbers(len(x.shape) - 1, "axis")
    ctx.draft.emit("SPLIT", [axis, x], parts, "SplitOptions", numSplits=groups)
    return parts
