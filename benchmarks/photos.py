"""Crops of photographs that packages ship, for calibration and evaluation; the sources are disjoint.

Calibration: scikit-image's pictures. Evaluation: the 20 ImageNet validation images inside foolbox.
Twenty photographs compare methods on equal terms; they are no estimate of ImageNet accuracy.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

SKIMAGE = (
    "astronaut.png", "brick.png", "camera.png", "cell.png",
    "chelsea.png", "clock_motion.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "horse.png", "hubble_deep_field.jpg",
    "ihc.png", "moon.png", "motorcycle_left.png", "page.png",
    "retina.jpg", "rocket.jpg",
)  # fmt: skip


def folder_of(package: str) -> Path:
    """Where a package is installed, found without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"this benchmark needs {package}: pip install -r benchmarks/requirements.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def crops(paths: list[Path], count: int, seed: int, size: int = 224) -> np.ndarray:
    """Random square crops, mirrored half of the time, brightness 0.8 to 1.2; float32 [count, 3, size, size].

    Values are EfficientNet-Lite's `(pixel - 127) / 128`.
    """
    rng = np.random.default_rng(seed)
    pictures = [np.asarray(Image.open(p).convert("RGB")) for p in paths]
    result = np.empty((count, 3, size, size), np.float32)
    for index in range(count):
        picture = pictures[index % len(pictures)]
        height, width = picture.shape[:2]
        side = int(min(height, width) * rng.uniform(0.45, 1.0))
        top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        crop = Image.fromarray(picture[top : top + side, left : left + side])
        pixels = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC), np.float32)
        pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
        pixels = np.clip(pixels * rng.uniform(0.8, 1.2), 0, 255)
        result[index] = ((pixels - 127) / 128).transpose(2, 0, 1)
    return result


def calibration(count: int = 128, size: int = 224) -> np.ndarray:
    data = folder_of("skimage") / "data"
    return crops([data / name for name in SKIMAGE], count, seed=0, size=size)


def evaluation(count: int = 100, size: int = 224) -> np.ndarray:
    data = folder_of("foolbox") / "data"
    return crops(sorted(data.glob("imagenet_*.jpg")), count, seed=1, size=size)
