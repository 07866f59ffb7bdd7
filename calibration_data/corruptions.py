"""Corruptions of pictures and sounds at five severities: what the field does to an input.

Pictures: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations (2019); the constants are theirs, those of ImageNet-C above 64 pixels and those of CIFAR-10-C
up to 64. (The package `imagecorruptions` cannot be imported beside NumPy 2 and current scikit-image.)
Sounds: white noise at a signal to noise ratio, and speed.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from edgecomp.errors import DataError
from edgecomp.spec import Preprocessing

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 64

Pixels = np.ndarray  # float64 [H, W, C] in [0, 1]
Corruption = Callable[[Pixels, float, np.random.Generator], Pixels]


def gaussian_noise(x: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    return x + rng.normal(scale=amount, size=x.shape)


def shot_noise(x: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    return rng.poisson(x * amount) / amount


def impulse_noise(x: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    hit = rng.random(x.shape) < amount
    return np.where(hit, rng.integers(0, 2, x.shape).astype(np.float64), x)


def gaussian_blur(x: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    return _through_pillow(x, lambda p: p.filter(ImageFilter.GaussianBlur(amount)))


def brightness(x: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    return x + amount


def contrast(x: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    means = x.mean(axis=(0, 1), keepdims=True)
    return (x - means) * amount + means


def pixelate(x: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    def coarse(picture: Image.Image) -> Image.Image:
        small = max(1, int(picture.width * amount)), max(1, int(picture.height * amount))
        return picture.resize(small, Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)

    return _through_pillow(x, coarse)


def jpeg_compression(x: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    def squeezed(picture: Image.Image) -> Image.Image:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=int(amount))
        return Image.open(stream).convert(picture.mode)

    return _through_pillow(x, squeezed)


def _through_pillow(x: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    pixels = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
    changed = change(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    return np.asarray(changed, np.float64).reshape(x.shape) / 255


# Name -> function, amounts at severity 1 to 5 for large pictures, and for small ones.
PICTURES: dict[str, tuple[Corruption, tuple[float, ...], tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian_blur": (gaussian_blur, (1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
}


class PictureCorruptions:
    """Corrupts normalized pictures: the preprocessing is undone, the corruption applied, and redone."""

    names = tuple(PICTURES)

    @classmethod
    def accepts(cls, sample: np.ndarray, how: Preprocessing | None) -> bool:
        return how is not None and how.sample_rate is None and sample.ndim == 3

    def __call__(
        self, sample: np.ndarray, how: Preprocessing, name: str, severity: int, rng: np.random.Generator
    ) -> np.ndarray:
        """One sample in the preprocessing's layout, corrupted and rounded to 8 bits as a camera would."""
        function, large, small = PICTURES[name]
        first = how.layout != "NHWC"
        values = np.moveaxis(sample, 0, -1) if first else sample
        mean, std = np.asarray(how.mean), np.asarray(how.std)
        unit = np.clip((values.astype(np.float64) * std + mean) / (how.rescale * 255), 0, 1)
        amounts = small if max(unit.shape[:2]) <= SMALL_SIDE else large
        changed = np.clip(function(unit, amounts[_at(severity)], rng), 0, 1)
        pixels = np.rint(changed * 255)
        done = (pixels * how.rescale - mean) / std
        return (np.moveaxis(done, -1, 0) if first else done).astype(sample.dtype)


class SoundCorruptions:
    """Noise at 30 to 5 dB, and playing 5 to 25 % faster (the end is filled with silence)."""

    names = ("white_noise", "speed")
    _AMOUNTS = {"white_noise": (30, 20, 15, 10, 5), "speed": (1.05, 1.1, 1.15, 1.2, 1.25)}

    @classmethod
    def accepts(cls, sample: np.ndarray, how: Preprocessing | None) -> bool:
        return how is not None and how.sample_rate is not None

    def __call__(
        self, sample: np.ndarray, how: Preprocessing, name: str, severity: int, rng: np.random.Generator
    ) -> np.ndarray:
        amount = self._AMOUNTS[name][_at(severity)]
        axis = 0 if sample.ndim == 1 or how.layout == "NWC" else 1
        if name == "white_noise":
            power = float(np.mean(sample.astype(np.float64) ** 2))
            noise = rng.normal(size=sample.shape) * np.sqrt(power / 10 ** (amount / 10))
            return (sample + noise).astype(sample.dtype)
        count = sample.shape[axis]
        positions = np.arange(count) * amount
        return np.apply_along_axis(
            lambda s: np.interp(positions, np.arange(count), s, right=0.0), axis, sample
        ).astype(sample.dtype)


def _at(severity: int) -> int:
    if severity not in SEVERITIES:
        raise DataError(f"severity is {severity}; expected 1 to 5")
    return severity - 1
