"""MIL's convolutions and pooling, one to three spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from edgecomp.runtimes.coreml_args import Table, along, ints

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def padding(
    pad_type: str, pad: Tensor | None, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) for each spatial dimension; `kernel` with dilation.

    `same`: outputs are ceil(size / stride); an odd total puts the extra one after (`same_lower`: before).
    """
    if pad_type == "valid":
        return [(0, 0)] * len(size)
    if pad_type == "custom":
        amounts = ints(pad) if pad is not None else [0] * (2 * len(size))
        return list(zip(amounts[0::2], amounts[1::2], strict=True))
    pairs = []
    for extent, k, stride in zip(size, kernel, strides, strict=True):
        total = max(0, (math.ceil(extent / stride) - 1) * stride + k - extent)
        small, large = total // 2, total - total // 2
        pairs.append((small, large) if pad_type == "same" else (large, small))
    return pairs


def _pad(x: Tensor, pairs: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    flat = [amount for pair in reversed(pairs) for amount in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | int = 1,
) -> Tensor:
    """x [n, C_in, *d], weight [C_out, C_in / groups, *k]."""
    dims = x.dim() - 2
    stride = ints(strides) if strides is not None else [1] * dims
    dilation = ints(dilations) if dilations is not None else [1] * dims
    kernel = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    pairs = padding(pad_type, pad, x.shape[2:], kernel, stride)
    if all(before == after for before, after in pairs):
        symmetric = [before for before, _ in pairs]
        return _CONV[dims](x, weight, bias, stride, symmetric, dilation, int(groups))
    return _CONV[dims](_pad(x, pairs), weight, bias, stride, 0, dilation, int(groups))


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Tensor | None = None,
    output_shape: Tensor | None = None,
    pad_type: str = "valid",
    strides: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | int = 1,
) -> Tensor:
    """x [n, C_in, *d], weight [C_in, C_out / groups, *k]: the full result, cropped as `pad` says."""
    dims = x.dim() - 2
    stride = ints(strides) if strides is not None else [1] * dims
    dilation = ints(dilations) if dilations is not None else [1] * dims
    full = _CONV_TRANSPOSE[dims](x, weight, None, stride, 0, 0, int(groups), dilation)
    wanted = ints(output_shape)[2:] if output_shape is not None else None
    crops = []
    for i, extent in enumerate(full.shape[2:]):
        if pad_type == "same":
            target = wanted[i] if wanted else x.shape[2 + i] * stride[i]
            before = (extent - target) // 2
        else:
            before, after = (
                ints(pad)[2 * i : 2 * i + 2] if pad is not None and pad_type == "custom" else (0, 0)
            )
            target = wanted[i] if wanted else extent - before - after
        crops.append((-before, target + before - extent))
    result = _pad(full, crops)  # a negative amount crops
    return result if bias is None else result + along(bias, 1, result.dim())


def _window(
    x: Tensor, kernel_sizes: Tensor, strides: Tensor | None, pad_type: str, pad: Tensor | None
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    kernel = ints(kernel_sizes)
    stride = ints(strides) if strides is not None else [1] * len(kernel)
    return kernel, stride, padding(pad_type, pad, x.shape[2:], kernel, stride)


def _fits_torch(pairs: Sequence[tuple[int, int]], kernel: Sequence[int]) -> bool:
    return all(b == a and 2 * b <= k for (b, a), k in zip(pairs, kernel, strict=True))


def avg_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    exclude_padding_from_average: Tensor | bool = False,
    ceil_mode: Tensor | bool = False,
) -> Tensor:
    kernel, stride, pairs = _window(x, kernel_sizes, strides, pad_type, pad)
    pool, exclude = _AVG_POOL[len(kernel)], bool(exclude_padding_from_average)
    if _fits_torch(pairs, kernel):
        return pool(x, kernel, stride, [b for b, _ in pairs], bool(ceil_mode), not exclude)
    mean = pool(_pad(x, pairs), kernel, stride, 0, bool(ceil_mode))
    if not exclude:
        return mean
    inside = pool(_pad(torch.ones_like(x[:1, :1]), pairs), kernel, stride, 0, bool(ceil_mode))
    return mean / inside


def max_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    ceil_mode: Tensor | bool = False,
) -> Tensor:
    kernel, stride, pairs = _window(x, kernel_sizes, strides, pad_type, pad)
    pool = _MAX_POOL[len(kernel)]
    if _fits_torch(pairs, kernel):
        return pool(x, kernel, stride, [b for b, _ in pairs], ceil_mode=bool(ceil_mode))
    return pool(_pad(x, pairs, -math.inf), kernel, stride, ceil_mode=bool(ceil_mode))


def l2_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    ceil_mode: Tensor | bool = False,
) -> Tensor:
    """Square root of the sum of squares in every window."""
    mean = avg_pool(x.square(), kernel_sizes, strides, pad_type, pad, False, ceil_mode)
    return (mean * math.prod(ints(kernel_sizes))).sqrt()


OPS: Table = {
    "avg_pool": avg_pool,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "l2_pool": l2_pool,
    "max_pool": max_pool,
}
