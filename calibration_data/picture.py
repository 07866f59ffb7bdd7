"""One picture -> what the model takes, exactly as a `Preprocessing` says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from edgecomp.errors import DataError
from edgecomp.spec import Preprocessing

_KERNELS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def decode(path: Path) -> Image.Image:
    """Open and decode a picture, turned upright by its EXIF tag. Raises DataError that names the file."""
    try:
        with Image.open(path) as opened:
            opened.load()
            return ImageOps.exif_transpose(opened)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} does not decode as a picture ({error}); remove it or replace it by a whole file"
        ) from error


def prepare(picture: Image.Image, how: Preprocessing) -> np.ndarray:
    """Resize, crop, order the colours and normalize. Returns one sample in `how.layout` without N.

    Steps: shorter side to `resize` (without it: so that the picture just covers `size`; with crop `none`:
    stretched to `size`), centre crop to `size`, colour order, `(pixel * rescale - mean) / std`, dtype.
    """
    picture = picture.convert("L" if how.colour_order == "L" else "RGB")
    picture = crop(resized(picture, how), how)
    pixels = np.asarray(picture)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return normalize(pixels, how)


def normalize(pixels: np.ndarray, how: Preprocessing) -> np.ndarray:
    """uint8 [H, W, C] in RGB (or L) order -> a sample in `how.layout` and `how.dtype`."""
    if how.colour_order == "BGR":
        pixels = pixels[:, :, ::-1]
    channels = pixels.shape[2]
    for name, values in (("mean", how.mean), ("std", how.std)):
        if len(values) not in (1, channels):
            raise DataError(
                f"{name} has {len(values)} values for {channels} channels ({how.colour_order}); "
                "give one value, or one for each channel"
            )
    mean = np.asarray(how.mean, dtype=np.float32)
    std = np.asarray(how.std, dtype=np.float32)
    scaled = (pixels.astype(np.float32) * np.float32(how.rescale) - mean) / std
    if how.layout == "NCHW":
        scaled = scaled.transpose(2, 0, 1)
    return np.ascontiguousarray(scaled).astype(how.dtype)


def resized(picture: Image.Image, how: Preprocessing) -> Image.Image:
    width, height = picture.size
    if how.resize is not None:
        target = _shorter_side(width, height, how.resize)
    elif how.size is None:
        return picture
    elif how.crop == "none":
        target = (how.size[1], how.size[0])
    else:
        scale = max(how.size[0] / height, how.size[1] / width)
        target = (max(how.size[1], round(width * scale)), max(how.size[0], round(height * scale)))
    if target == picture.size:
        return picture
    return _resize(picture, target, how)


def _shorter_side(width: int, height: int, side: int) -> tuple[int, int]:
    """torchvision's rule: the longer side is `int(side * longer / shorter)`."""
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _resize(picture: Image.Image, target: tuple[int, int], how: Preprocessing) -> Image.Image:
    kernel = _KERNELS[how.kernel]
    if how.antialias or how.kernel == "nearest":
        return picture.resize(target, kernel)
    if how.kernel == "lanczos":
        raise DataError(
            "kernel 'lanczos' without antialias does not exist; use antialias: true, or another kernel"
        )
    # Pillow's affine transform samples at half-pixel centres and never widens the kernel, which is what
    # `torch.nn.functional.interpolate(antialias=False)` and most on-device resizers do.
    x, y = picture.width / target[0], picture.height / target[1]
    return picture.transform(target, Image.Transform.AFFINE, (x, 0, 0, 0, y, 0), resample=kernel)


def crop(picture: Image.Image, how: Preprocessing) -> Image.Image:
    if how.size is None or how.crop == "none":
        return picture
    height, width = how.size
    if picture.width < width or picture.height < height:
        raise DataError(
            f"a picture of {picture.height} x {picture.width} pixels (after resize) is smaller than the crop "
            f"of {height} x {width}: make resize at least {max(height, width)}"
        )
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    return picture.crop((left, top, left + width, top + height))
