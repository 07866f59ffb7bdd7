"""What every data source shares: order, batches, labels, and the check that values are finite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from edgecomp.errors import DataError
from edgecomp.spec import Batch, Preprocessing


class IndexedSource(ABC):
    """A source whose samples can be read by number; only one batch is in memory at a time.

    A subclass sets `labels` and `preprocessing`, and implements `__len__` and `read`.
    """

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: np.ndarray) -> Batch:
        """The samples with these numbers, in this order."""

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        """Batches of `size` samples (the last may be smaller), in order or shuffled by a seed.

        Raises DataError when a sample does not decode, has another shape, or holds NaN or Inf.
        """
        check_size(size)
        order = np.arange(len(self))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(order)
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            batch = self.read(indices)
            check_finite(batch, indices)
            yield batch


def check_size(size: int) -> None:
    if size < 1:
        raise DataError(f"batch size is {size}; expected 1 or more")


def check_finite(batch: Batch, indices: Sequence[int] | np.ndarray) -> None:
    """Raise DataError that names the first sample with NaN or Inf in an input or in its target."""
    arrays = [("input", a) for a in batch.inputs]
    if batch.targets is not None:
        arrays.append(("target", batch.targets))
    for kind, array in arrays:
        if not np.issubdtype(array.dtype, np.floating):
            continue
        good = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not good.all():
            at = int(np.argmin(good))
            name = batch.rows[at].get("path") if batch.rows else None
            raise DataError(
                f"sample {int(indices[at])}{f' ({name})' if name else ''} holds NaN or Inf in its {kind}; "
                "every value must be finite: remove the sample or repair it"
            )


def stack(samples: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Samples of one shape -> one array [N, ...]. Raises DataError that names the one that differs."""
    for sample, name in zip(samples, names, strict=True):
        if sample.shape != samples[0].shape:
            raise DataError(
                f"{name} has shape {sample.shape}, {names[0]} has {samples[0].shape}; all samples must have "
                "one shape: give a preprocessing with a size, or make them equal"
            )
    return np.stack(samples)


def labelled_files(
    folder: Path, suffixes: frozenset[str], kind: str, labels: tuple[str, ...] | None
) -> tuple[list[Path], np.ndarray | None, tuple[str, ...]]:
    """Files below `folder`, the class number of each, and the class names.

    Sub-folders are classes, numbered in the order of `labels`, or alphabetically without it. Files that
    lie in `folder` itself have no class. Order: by class, then by name. Hidden files are skipped.
    Raises DataError when nothing is there, when both forms are mixed, or when a folder is not in `labels`.
    """
    if not folder.exists():
        raise DataError(f"no folder at {folder}; expected a folder of {kind}, sub-folders being labels")
    found = {d.name: _files(d, suffixes) for d in sorted(folder.iterdir()) if _is_class_folder(d)}
    found = {name: files for name, files in found.items() if files}
    loose = [p for p in sorted(folder.iterdir()) if _is_data(p, suffixes)]
    if loose and found:
        raise DataError(
            f"{folder} holds {kind} beside sub-folders ({loose[0].name} beside {next(iter(found))}/); "
            "put every file into the sub-folder of its label, or none"
        )
    if not loose and not found:
        raise DataError(
            f"{folder} holds no {kind}; expected files that end in {', '.join(sorted(suffixes))}, in the "
            "folder itself or in one sub-folder for each label"
        )
    if loose:
        return loose, None, labels or ()
    names = labels or tuple(found)
    strangers = [n for n in found if n not in names]
    if strangers:
        raise DataError(
            f"{folder} has sub-folders that are not labels of the model: {', '.join(strangers[:5])}; "
            f"expected names from: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"
        )
    files = [(names.index(name), p) for name, paths in found.items() for p in paths]
    files.sort()
    return [p for _, p in files], np.array([c for c, _ in files], dtype=np.int64), names


def _is_class_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _is_data(path: Path, suffixes: frozenset[str]) -> bool:
    return path.is_file() and path.suffix.lower() in suffixes and not path.name.startswith(".")


def _files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if _is_data(p, suffixes)]
