"""Pooling, resizing, and pixel shuffles: operations on NHWC tensors without weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from edgecomp.exporters import tflite_layout as layout
from edgecomp.exporters.tflite_conv import Window, pad_spatial, shuffle_order
from edgecomp.exporters.tflite_file import Tensor, padding
from edgecomp.exporters.tflite_lower import Lowering, Value
from edgecomp.exporters.tflite_table import Unsupported, args, argument, lowers, pair

aten = torch.ops.aten

_LOWEST = float(np.finfo(np.float32).min)


def _window(node: Node, size: tuple[int, int], dilation: Any, ceil_mode: bool) -> Window:
    kernel = pair(argument(node, 1, "kernel_size"))
    stride = pair(argument(node, 2, "stride") or kernel)
    pad = pair(argument(node, 3, "padding", 0))
    out = tuple(int(d) for d in node.meta["val"].shape[2:])
    steps = pair(dilation)
    pads = []
    for n, k, s, p, d, o in zip(size, kernel, stride, pad, steps, out, strict=True):
        after = (o - 1) * s + d * (k - 1) + 1 - n - p if ceil_mode else p
        pads.append((p, max(after, p)))
    return Window(kernel, stride, steps, (pads[0], pads[1]))


def _pool(ctx: Lowering, node: Node, code: str, x: Tensor, window: Window, mode: str) -> Tensor:
    shape = ctx.shape_of(node)
    made = ctx.result(node, (shape[0], shape[2], shape[3], shape[1]), like=x)
    return _emit_pool(ctx, code, x, made, window, mode)


def _emit_pool(ctx: Lowering, code: str, x: Tensor, made: Tensor, window: Window, mode: str) -> Tensor:
    return ctx.draft.emit(
        code, [x], [made], "Pool2DOptions",
        padding=padding(mode), strideH=window.stride[0], strideW=window.stride[1],
        filterHeight=window.kernel[0], filterWidth=window.kernel[1], fusedActivationFunction=0,
    )  # fmt: skip


@lowers(aten.max_pool2d.default)
def max_pool2d(ctx: Lowering, node: Node) -> Value:
    """Padding that SAME does not give is made with the lowest value, as PyTorch pads with -inf."""
    value = ctx.input(node, args(node)[0], perm=layout.channels_last(4))
    x, size = value.tensor, (value.tensor.shape[1], value.tensor.shape[2])
    ceil_mode = bool(argument(node, 5, "ceil_mode", False))
    window = _window(node, size, argument(node, 4, "dilation", 1), ceil_mode)
    if window.dilation != (1, 1):
        raise Unsupported(f"max pooling with dilation {window.dilation}")
    mode = "SAME" if window.same(size) else "VALID"
    if mode == "VALID" and window.padded:
        x = pad_spatial(ctx, node, x, window.trimmed(size), _LOWEST)
    return Value(_pool(ctx, node, "MAX_POOL_2D", x, window, mode), layout.channels_last(4))


@lowers(aten.avg_pool2d.default)
def avg_pool2d(ctx: Lowering, node: Node) -> Value:
    """TFLite's SAME leaves padding out of the mean; zeros that count are made with PAD."""
    if argument(node, 6, "divisor_override") is not None:
        raise Unsupported("average pooling with divisor_override")
    value = ctx.input(node, args(node)[0], perm=layout.channels_last(4))
    x, size = value.tensor, (value.tensor.shape[1], value.tensor.shape[2])
    window = _window(node, size, 1, bool(argument(node, 4, "ceil_mode", False)))
    counts = bool(argument(node, 5, "count_include_pad", True))
    asked = pair(argument(node, 3, "padding", 0))
    if not any(p for axis in window.trimmed(size) for p in axis):
        mode = "VALID"
    elif window.same(size) and (not counts or asked == (0, 0)):
        mode = "SAME"
    elif counts and all(after <= p for (_, after), p in zip(window.trimmed(size), asked, strict=True)):
        mode, x = "VALID", pad_spatial(ctx, node, x, window.trimmed(size))
    else:
        raise Unsupported("average pooling whose windows cross a border that does not count")
    return Value(_pool(ctx, node, "AVERAGE_POOL_2D", x, window, mode), layout.channels_last(4))


@lowers(aten.adaptive_avg_pool2d.default)
def adaptive_avg_pool2d(ctx: Lowering, node: Node) -> Value:
    raise Unsupported("adaptive pooling to a size that does not divide the input")


@lowers(aten.adaptive_max_pool2d.default)
def adaptive_max_pool2d(ctx: Lowering, node: Node) -> list[Value]:
    """The values, without their positions; to one pixel, or in equal windows."""
    value = ctx.input(node, args(node)[0], perm=layout.channels_last(4))
    size = value.tensor.shape[1:3]
    out = [int(n) for n in node.meta["val"][0].shape[2:]]
    if any(n % m for n, m in zip(size, out, strict=True)):
        raise Unsupported("adaptive pooling to a size that does not divide the input")
    step = (size[0] // out[0], size[1] // out[1])
    stored = (value.tensor.shape[0], *out, value.tensor.shape[3])
    made = ctx.part(node, "values", stored, value.tensor)
    _emit_pool(ctx, "MAX_POOL_2D", value.tensor, made, Window(step, step, (1, 1), ((0, 0), (0, 0))), "VALID")
    return [Value(made, layout.channels_last(4))]


@lowers(aten.upsample_nearest2d.vec, aten._upsample_nearest_exact2d.vec)
def upsample_nearest2d(ctx: Lowering, node: Node) -> Value:
    """PyTorch's `nearest` floors as TFLite does by default; `nearest-exact` takes half pixel centres."""
    exact = node.target is aten._upsample_nearest_exact2d.vec
    _check_ratio(ctx, node, argument(node, 2, "scale_factors"))
    return _resize(ctx, node, "RESIZE_NEAREST_NEIGHBOR", "ResizeNearestNeighborOptions", False, exact)


@lowers(aten.upsample_bilinear2d.vec)
def upsample_bilinear2d(ctx: Lowering, node: Node) -> Value:
    corners = bool(argument(node, 2, "align_corners", False))
    if not corners:
        _check_ratio(ctx, node, argument(node, 3, "scale_factors"))
    return _resize(ctx, node, "RESIZE_BILINEAR", "ResizeBilinearOptions", corners, not corners)


def _check_ratio(ctx: Lowering, node: Node, factors: Any) -> None:
    """TFLite samples by the ratio of the sizes; PyTorch by the factor that the user gave."""
    before, after = ctx.shape_of(args(node)[0])[2:], ctx.shape_of(node)[2:]
    for n, m, factor in zip(before, after, factors or (None, None), strict=True):
        if factor is not None and not math.isclose(m / n, float(factor), rel_tol=1e-6):
            raise Unsupported(
                f"resizing {n} to {m} by a factor of {factor}; give `size` instead of `scale_factor`"
            )


def _resize(ctx: Lowering, node: Node, code: str, table: str, corners: bool, half: bool) -> Value:
    value = ctx.input(node, args(node)[0], perm=layout.channels_last(4))
    shape = ctx.shape_of(node)
    made = ctx.result(node, (shape[0], shape[2], shape[3], shape[1]), like=value.tensor)
    size = ctx.numbers(shape[2:], "size")
    ctx.draft.emit(code, [value.tensor, size], [made], table, alignCorners=corners, halfPixelCenters=half)
    return Value(made, layout.channels_last(4))


@lowers(aten.pixel_shuffle.default)
def pixel_shuffle(ctx: Lowering, node: Node) -> Value:
    """DEPTH_TO_SPACE; the convolution before has the channels in its order, or GATHER moves them."""
    factor = int(args(node)[1])
    if ctx.is_wide(node):
        return _transposed_shuffle(ctx, node, factor)
    value = ctx.input(node, args(node)[0], keep_order=True)
    order = shuffle_order(value.shape[1], factor)
    if value.order is None or value.order[0] != 1 or not np.array_equal(value.order[1], order):
        value = ctx.input(node, args(node)[0], perm=layout.channels_last(4))
        x = value.tensor
        if value.shape[1] != factor * factor:
            made = ctx.part(node, "ordered", x.shape, x)
            index = ctx.numbers(order.tolist(), "order")
            x = ctx.draft.emit("GATHER", [x, index], [made], "GatherOptions", axis=3, batchDims=0)
    else:
        x = ctx.relaid(node, value, layout.channels_last(4)).tensor
    shape = ctx.shape_of(node)
    out = ctx.result(node, (shape[0], shape[2], shape[3], shape[1]), like=x)
    ctx.draft.emit("DEPTH_TO_SPACE", [x], [out], "DepthToSpaceOptions", blockSize=factor)
    return Value(out, layout.channels_last(4))


def _transposed_shuffle(ctx: Lowering, node: Node, factor: int) -> Value:
    """[N, H, W, c, row, column] -> [N, H, row, W, column, c]: DEPTH_TO_SPACE has no 16-bit kernel."""
    x = ctx.input(node, args(node)[0], perm=layout.channels_last(4)).tensor
    batch, height, width, channels = x.shape
    parts = ctx.reshape(node, x, (batch, height, width, channels // factor**2, factor, factor))
    moved = layout.stored_shape(parts.shape, (0, 1, 4, 2, 5, 3))
    swapped = ctx.part(node, "transposed", moved, x)
    ctx.draft.emit(
        "TRANSPOSE", [parts, ctx.numbers((0, 1, 4, 2, 5, 3), "perm")], [swapped], "TransposeOptions"
    )
    shape = ctx.shape_of(node)
    out = ctx.result(node, (shape[0], shape[2], shape[3], shape[1]), like=x)
    return Value(ctx.reshape(node, swapped, out.shape, out), layout.channels_last(4))
