"""`.npz` and `.npy` files.

In an `.npz` the arrays are called

- `inputs` (or `x`, `images`, `data`) [N, ...]; a model of several inputs: `inputs_0`, `inputs_1`, ...;
- `targets` (or `y`, `target`) [N, ...], optional;
- `labels` (or `classes`) [C] of strings, optional: the class names;
- `meta_NAME` [N], optional: a metadata column called NAME, for slices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgecomp.calibration_data import npy, picture
from edgecomp.calibration_data.base import IndexedSource, stack
from edgecomp.errors import DataError
from edgecomp.spec import Batch, Preprocessing

INPUT_NAMES = ("inputs", "x", "images", "data")
TARGET_NAMES = ("targets", "y", "target")
LABEL_NAMES = ("labels", "classes")


class Arrays(IndexedSource):
    """Arrays in a file, read batch by batch.

    Floating-point inputs are taken as the model takes them. 8-bit pictures, [N, H, W, C] or [N, H, W],
    go through `preprocessing` where one is given, and stay as they are where none is.
    Raises DataError for a file that is missing, damaged or empty, and for arrays of different length.
    """

    def __init__(
        self, spec: str, preprocessing: Preprocessing | None = None, labels: tuple[str, ...] | None = None
    ) -> None:
        self.path = Path(spec)
        self.preprocessing = preprocessing
        if not self.path.is_file():
            raise DataError(f"no file at {self.path}; expected an .npz or .npy file")
        self.targets: npy.RowReader | None = None
        self.metadata: dict[str, np.ndarray] = {}
        if self.path.suffix == ".npy":
            self.inputs = [npy.RowReader(self.path)]
            self.labels = labels or ()
        else:
            self._open_archive(labels)
        self._check_lengths()
        self._check_labels()

    @classmethod
    def accepts(cls, spec: str) -> bool:
        return spec.endswith((".npz", ".npy"))

    def __len__(self) -> int:
        return len(self.inputs[0])

    def read(self, indices: np.ndarray) -> Batch:
        inputs = tuple(self._prepared(r.rows(indices)) for r in self.inputs)
        targets = None if self.targets is None else self.targets.rows(indices)
        rows: tuple[dict[str, Any], ...] = ()
        if self.metadata:
            rows = tuple({k: v[i].item() for k, v in self.metadata.items()} for i in indices)
        return Batch(inputs, targets, rows)

    def _open_archive(self, labels: tuple[str, ...] | None) -> None:
        found = npy.members(self.path)
        self.inputs = [npy.RowReader(self.path, found[n]) for n in _input_names(self.path, found)]
        target = next((n for n in TARGET_NAMES if n in found), None)
        self.targets = npy.RowReader(self.path, found[target]) if target else None
        names = next((n for n in LABEL_NAMES if n in found), None)
        own = () if names is None else tuple(str(v) for v in _all(npy.RowReader(self.path, found[names])))
        if labels and own and labels != own:
            raise DataError(
                f"{self.path} has labels {', '.join(own[:5])}..., the model {', '.join(labels[:5])}...; "
                "both must be the same, in the same order"
            )
        self.labels = labels or own
        self.metadata = {
            n.removeprefix("meta_"): _all(npy.RowReader(self.path, member))
            for n, member in found.items()
            if n.startswith("meta_")
        }

    def _check_lengths(self) -> None:
        count = len(self.inputs[0])
        if count == 0:
            raise DataError(f"{self.inputs[0].name} is empty; expected an array [N, ...] of N samples")
        others = [*self.inputs[1:], *([self.targets] if self.targets else [])]
        lengths = {r.name: len(r) for r in others} | {f"meta_{k}": len(v) for k, v in self.metadata.items()}
        for name, length in lengths.items():
            if length != count:
                raise DataError(
                    f"{name} has {length} rows, {self.inputs[0].name} has {count}; "
                    "all arrays must have one row for each sample"
                )

    def _check_labels(self) -> None:
        if self.targets is None or not self.labels or self.targets.dtype.kind not in "iu":
            return
        if len(self.targets.shape) == 1:
            check_classes(_all(self.targets), self.labels, self.targets.name)

    def _prepared(self, array: np.ndarray) -> np.ndarray:
        how = self.preprocessing
        if how is None or array.dtype != np.uint8 or array.ndim not in (3, 4):
            return array
        pictures = [a[:, :, 0] if a.ndim == 3 and a.shape[2] == 1 else a for a in array]
        if pictures[0].ndim == 3 and pictures[0].shape[2] != 3:
            raise DataError(
                f"{self.inputs[0].name} has pictures of shape {array.shape[1:]}; expected [H, W, 3] or "
                "[H, W] in 8 bits, for a preprocessing to apply to: store NHWC, or floats that are ready"
            )
        samples = [picture.prepare(Image.fromarray(p), how) for p in pictures]
        return stack(samples, [f"sample {i}" for i in range(len(samples))])


def check_classes(targets: np.ndarray, labels: tuple[str, ...], name: str) -> None:
    """Raise DataError when a class number has no label."""
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= len(labels):
        raise DataError(
            f"{name} holds class {low if low < 0 else high}, there are {len(labels)} labels; "
            f"expected 0 to {len(labels) - 1}: correct the targets or the labels"
        )


def _all(reader: npy.RowReader) -> np.ndarray:
    return reader.rows(np.arange(len(reader)))


def _input_names(path: Path, found: dict[str, str]) -> list[str]:
    numbered: list[str] = []
    while f"inputs_{len(numbered)}" in found:
        numbered.append(f"inputs_{len(numbered)}")
    if numbered:
        return numbered
    for name in INPUT_NAMES:
        if name in found:
            return [name]
    raise DataError(
        f"{path} holds arrays {', '.join(found) or '(none)'}; one must be called "
        f"{', '.join(INPUT_NAMES)}, or inputs_0, inputs_1, ... for a model of several inputs"
    )
