"""MIL's resizing and resampling of pictures; sampling grids from coremltools' `image_resizing.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from edgecomp.errors import ArtifactError
from edgecomp.runtimes.coreml_args import Table, ints


def grid(size: int, target: int, mode: str) -> Tensor:
    """Where each of `target` samples lies on the axis [0, size - 1]."""
    i = torch.arange(target, dtype=torch.float64)
    last = size - 1
    if mode == "ALIGN_CORNERS" and target == 1:
        places = torch.full((1,), last / 2, dtype=torch.float64)
    elif mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        places = i * (last / max(target - 1, 1))
    elif mode == "UNALIGN_CORNERS":
        places = (i + 0.5) * (size / target) - 0.5
    elif mode == "OFFSET_CORNERS":
        places = (i + 0.5) * (max(1, last) / target)
    else:
        places = i * (size / target)
    return places.clamp(0, last)


def _linear(x: Tensor, axis: int, places: Tensor) -> Tensor:
    low = places.floor().long()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    shape = [1] * x.dim()
    shape[axis] = -1
    share = (places - low).to(x.dtype).reshape(shape)
    return x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share


def _resize(x: Tensor, targets: dict[int, int], mode: str, nearest: bool) -> Tensor:
    for axis, target in targets.items():
        places = grid(x.shape[axis], target, mode)
        if nearest:
            rounded = places.floor() if mode == "DEFAULT" else (places + 0.5).floor()
            x = x.index_select(axis, rounded.long().clamp(max=x.shape[axis] - 1))
        else:
            x = _linear(x, axis, places)
    return x


def _scaled(x: Tensor, height: Tensor | float, width: Tensor | float) -> dict[int, int]:
    rank = x.dim()
    return {
        rank - 2: math.floor(x.shape[-2] * float(height)),
        rank - 1: math.floor(x.shape[-1] * float(width)),
    }


def upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: Tensor | float = 1, scale_factor_width: Tensor | float = 1
) -> Tensor:
    return _resize(x, _scaled(x, scale_factor_height, scale_factor_width), "DEFAULT", True)


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: Tensor | float = 1,
    scale_factor_width: Tensor | float = 1,
    align_corners: Tensor | bool = True,
    half_pixel_centers: Tensor | None = None,
) -> Tensor:
    """`half_pixel_centers` (iOS 16) defaults to the opposite of `align_corners`."""
    half = not bool(align_corners) if half_pixel_centers is None else bool(half_pixel_centers)
    mode = "STRICT_ALIGN_CORNERS" if bool(align_corners) else "UNALIGN_CORNERS" if half else "DEFAULT"
    return _resize(x, _scaled(x, scale_factor_height, scale_factor_width), mode, False)


def resize_nearest_neighbor(x: Tensor, target_size_height: Tensor, target_size_width: Tensor) -> Tensor:
    targets = {x.dim() - 2: int(target_size_height), x.dim() - 1: int(target_size_width)}
    return _resize(x, targets, "DEFAULT", True)


def resize_bilinear(
    x: Tensor,
    target_size_height: Tensor | int = 1,
    target_size_width: Tensor | int = 1,
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    targets = {x.dim() - 2: int(target_size_height), x.dim() - 1: int(target_size_width)}
    return _resize(x, targets, sampling_mode, False)


def resize(
    x: Tensor,
    shape: Tensor,
    resized_dims: Tensor,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """The last `resized_dims` axes take the last sizes of `shape`; 0 keeps the input's."""
    count = int(resized_dims)
    axes = range(x.dim() - count, x.dim())
    sizes = ints(shape)[-count:] if count else []
    targets = {a: s for a, s in zip(axes, sizes, strict=True) if s not in (0, x.shape[a])}
    return _resize(x, targets, sampling_mode, interpolation_mode == "NEAREST_NEIGHBOR")


def crop(x: Tensor, crop_height: Tensor, crop_width: Tensor) -> Tensor:
    (top, bottom), (left, right) = ints(crop_height), ints(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Tensor,
    coordinates_mode: str,
    align_corners: Tensor,
) -> Tensor:
    """x [B, C, H, W] at `coordinates` [B, H2, W2, 2] in (x, y) order."""
    aligned = bool(align_corners)
    modes = {"constant": "zeros", "border": "border", "reflection" if aligned else "symmetric": "reflection"}
    if padding_mode not in modes:
        raise ArtifactError(
            f"resample with padding_mode {padding_mode!r} and align_corners={aligned} is not supported by "
            "the reference executor; expected constant, border, or the reflection that align_corners gives"
        )
    places = coordinates.float()
    if coordinates_mode == "unnormalized":
        extent = torch.tensor([x.shape[3], x.shape[2]], dtype=torch.float32)
        places = 2 * places / (extent - 1) - 1 if aligned else (2 * places + 1) / extent - 1
    elif coordinates_mode == "normalized_zero_to_one":
        places = 2 * places - 1
    value = float(padding_value) if padding_mode == "constant" else 0.0
    sampled = F.grid_sample(x - value, places, sampling_mode, modes[padding_mode], aligned)
    return sampled + value


def affine(
    x: Tensor,
    transform_matrix: Tensor,
    output_height: Tensor,
    output_width: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Tensor,
    coordinates_mode: str,
    align_corners: Tensor,
) -> Tensor:
    """x [B, C, H, W] seen through `transform_matrix` [B, 6]: a0, a1, a2, b0, b1, b2 of a 2 x 3 matrix.

    coremltools only writes bilinear sampling, zero padding and coordinates in [-1, 1].
    """
    size = [x.shape[0], x.shape[1], int(output_height), int(output_width)]
    matrix = transform_matrix.reshape(-1, 2, 3).expand(x.shape[0], 2, 3)
    places = F.affine_grid(matrix, size, bool(align_corners))
    return resample(x, places, sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners)


OPS: Table = {
    "affine": affine,
    "crop": crop,
    "resample": resample,
    "resize": resize,
    "resize_bilinear": resize_bilinear,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
