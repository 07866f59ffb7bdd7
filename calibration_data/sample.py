"""The sample that ships: a class-balanced part of Fashion-MNIST (MIT licence, notice in `samples/`).

Made by `scripts/make_fashion_sample.py` from the Debian package `dataset-fashion-mnist`. Usable as a data
argument: `edgecomp.calibration_data.sample:fashion_test`.
"""

from __future__ import annotations

import io
import lzma
from functools import cache
from importlib.resources import files

import numpy as np

from edgecomp.calibration_data import picture
from edgecomp.calibration_data.base import IndexedSource
from edgecomp.errors import DataError
from edgecomp.spec import Batch, Preprocessing

LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Mean and standard deviation of the pixels of the 60,000 training images, as Fashion-MNIST's users know them.
PREPROCESSING = Preprocessing(
    size=(28, 28), crop="none", colour_order="L", layout="NCHW", mean=(0.2860,), std=(0.3530,)
)
CALIBRATION_SAMPLES = 500


class Fashion(IndexedSource):
    """Images float32 [N, 1, 28, 28], targets int64 [N]; classes in turn, so any prefix is balanced."""

    def __init__(self, split: str, count: int | None = None) -> None:
        images, targets = _load(split)
        self.images = images[:count]
        self.targets = targets[:count]
        self.labels = LABELS
        self.preprocessing: Preprocessing = PREPROCESSING

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> Batch:
        samples = [picture.normalize(i[:, :, None], self.preprocessing) for i in self.images[indices]]
        rows = tuple({"path": f"fashion-mnist/{i}", "label": LABELS[self.targets[i]]} for i in indices)
        return Batch((np.stack(samples),), self.targets[indices], rows)


@cache
def _load(split: str) -> tuple[np.ndarray, np.ndarray]:
    return _array(f"fashion-{split}-images.npy.xz"), _array(f"fashion-{split}-labels.npy.xz").astype(np.int64)


def _array(name: str) -> np.ndarray:
    file = files("edgecomp.calibration_data") / "samples" / name
    try:
        return np.load(io.BytesIO(lzma.decompress(file.read_bytes())), allow_pickle=False)
    except (OSError, lzma.LZMAError, ValueError) as error:
        raise DataError(
            f"the shipped sample {name} cannot be read ({error}); install edgecomp again"
        ) from error


def fashion_train() -> Fashion:
    """5,800 training images, 580 of each class."""
    return Fashion("train")


def fashion_calibration() -> Fashion:
    """The first 500 of the training images, 50 of each class."""
    return Fashion("train", CALIBRATION_SAMPLES)


def fashion_test() -> Fashion:
    """2,000 test images, 200 of each class; none is in the training part."""
    return Fashion("test")
