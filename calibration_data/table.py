"""A CSV file: one row for each sample, numeric feature columns, a target column.

The target is the column called `target`, `label`, `class` or `y`, or the one named after a colon:
`iris.csv:species`. Whole numbers are class numbers, words are class names (numbered alphabetically, or
in the order of `labels`), other numbers are regression targets. Columns called `meta:NAME` are metadata.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgecomp.calibration_data.arrays import check_classes
from edgecomp.calibration_data.base import IndexedSource
from edgecomp.errors import DataError
from edgecomp.spec import Batch, Preprocessing

TARGET_NAMES = ("target", "label", "class", "y")


class Table(IndexedSource):
    """Features float32 [N, columns]. The file is read once; what is kept is 4 bytes a value.

    `preprocessing`: its mean and std (one value, or one for each column) are applied; nothing else is.
    Raises DataError for a missing or empty file, a value that is not a number, rows of another length.
    """

    def __init__(
        self, spec: str, preprocessing: Preprocessing | None = None, labels: tuple[str, ...] | None = None
    ) -> None:
        self.path, target = _split(spec)
        self.preprocessing = preprocessing
        header, rows = _read(self.path)
        column = _target_column(self.path, header, target)
        self.features = [i for i, n in enumerate(header) if i != column and not n.startswith("meta:")]
        if not self.features:
            raise DataError(f"{self.path} has columns {', '.join(header)}; expected at least one feature")
        self.values = _numbers(self.path, header, rows, self.features)
        self.metadata = {
            n.removeprefix("meta:"): [r[i] for r in rows] for i, n in enumerate(header) if n[:5] == "meta:"
        }
        self.targets, self.labels = None, labels or ()
        if column is not None:
            self.targets, self.labels = _targets(self.path, [r[column] for r in rows], labels)

    @classmethod
    def accepts(cls, spec: str) -> bool:
        return _split(spec)[0].suffix.lower() == ".csv"

    def __len__(self) -> int:
        return len(self.values)

    def read(self, indices: np.ndarray) -> Batch:
        values = self.values[indices]
        if self.preprocessing is not None:
            mean = np.asarray(self.preprocessing.mean, np.float32)
            std = np.asarray(self.preprocessing.std, np.float32)
            if mean.size not in (1, values.shape[1]) or std.size not in (1, values.shape[1]):
                raise DataError(
                    f"mean has {mean.size} and std {std.size} values for {values.shape[1]} columns of "
                    f"{self.path}; give one value, or one for each column"
                )
            values = (values - mean) / std
        targets = None if self.targets is None else self.targets[indices]
        rows = tuple({k: v[i] for k, v in self.metadata.items()} for i in indices) if self.metadata else ()
        return Batch((values,), targets, rows)


def _split(spec: str) -> tuple[Path, str | None]:
    head, colon, column = spec.rpartition(":")
    if colon and head.lower().endswith(".csv"):
        return Path(head), column
    return Path(spec), None


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    if not path.is_file():
        raise DataError(f"no file at {path}; expected a CSV file whose first row names the columns")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            lines = [row for row in csv.reader(stream) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8 ({error}); save it again as one") from error
    if len(lines) < 2:
        raise DataError(f"{path} has no rows; expected a first row of column names and one row a sample")
    header, rows = [n.strip() for n in lines[0]], lines[1:]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise DataError(f"{path}, row {number} has {len(row)} values; the header names {len(header)}")
    return header, rows


def _target_column(path: Path, header: list[str], asked: str | None) -> int | None:
    if asked is not None:
        if asked not in header:
            raise DataError(f"{path} has no column {asked!r}; its columns are {', '.join(header)}")
        return header.index(asked)
    lowered = [n.lower() for n in header]
    return next((lowered.index(n) for n in TARGET_NAMES if n in lowered), None)


def _numbers(path: Path, header: list[str], rows: Sequence[list[str]], columns: list[int]) -> np.ndarray:
    values = np.empty((len(rows), len(columns)), dtype=np.float32)
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            try:
                values[r, c] = float(row[column])
            except ValueError as error:
                raise DataError(
                    f"{path}, row {r + 2}, column {header[column]!r} is {row[column]!r}; expected a number: "
                    "encode it, or call the column 'meta:...' if it is no feature"
                ) from error
    return values


def _targets(
    path: Path, words: list[str], labels: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    try:
        numbers = np.array([float(w) for w in words])
    except ValueError:
        return _classes(path, words, labels)
    if np.isfinite(numbers).all() and (numbers == np.rint(numbers)).all():
        classes = numbers.astype(np.int64)
        if labels:
            check_classes(classes, labels, f"{path} (target)")
        return classes, labels or ()
    return numbers.astype(np.float32), ()


def _classes(
    path: Path, words: list[str], labels: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    names = labels or tuple(sorted(set(words)))
    index = {n: i for i, n in enumerate(names)}
    strangers = sorted(set(words) - set(names))
    if strangers:
        raise DataError(
            f"{path} has targets that are not labels of the model: {', '.join(strangers[:5])}; "
            f"expected names from: {', '.join(names[:10])}"
        )
    return np.array([index[w] for w in words], dtype=np.int64), names
