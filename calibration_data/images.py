"""A folder of pictures; sub-folders are labels."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from edgecomp.calibration_data import picture
from edgecomp.calibration_data.base import IndexedSource, labelled_files, stack
from edgecomp.errors import DataError
from edgecomp.spec import Batch, Preprocessing

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"))


class ImageFolder(IndexedSource):
    """Pictures below a folder, decoded batch by batch.

    `labels`: class names in the model's order (default: the sub-folders, sorted). A file `metadata.csv`
    in the folder, with a column `file` (path relative to the folder), adds its other columns to each row.
    Raises DataError for a folder that is missing or empty, and for files that are not pictures.
    """

    def __init__(
        self, spec: str, preprocessing: Preprocessing | None = None, labels: tuple[str, ...] | None = None
    ) -> None:
        self.folder = Path(spec)
        self.preprocessing: Preprocessing = preprocessing or Preprocessing()
        self.files, self.classes, self.labels = labelled_files(self.folder, SUFFIXES, "pictures", labels)
        _check_headers(self.files)
        self.metadata = read_metadata(self.folder)

    @classmethod
    def accepts(cls, spec: str) -> bool:
        folder = Path(spec)
        if not folder.is_dir():
            return False
        kinds = {p.suffix.lower() for p in folder.rglob("*") if p.is_file()}
        return bool(kinds & SUFFIXES) or not kinds & {".wav"}

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: np.ndarray) -> Batch:
        paths = [self.files[i] for i in indices]
        samples = [picture.prepare(picture.decode(p), self.preprocessing) for p in paths]
        targets = None if self.classes is None else self.classes[indices]
        rows = tuple(self._row(p) for p in paths)
        return Batch((stack(samples, [str(p) for p in paths]),), targets, rows)

    def _row(self, path: Path) -> Mapping[str, str]:
        return {"path": str(path), **self.metadata.get(path.relative_to(self.folder).as_posix(), {})}


def _check_headers(files: list[Path]) -> None:
    """Read each header now, so that a file that is no picture is found before long work starts."""
    bad = []
    for path in files:
        try:
            with Image.open(path):
                pass
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
            bad.append(path)
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(
            f"{', '.join(str(p) for p in bad[:3])}{more}: named like a picture but does not decode as one; "
            "remove it or replace it by a whole file"
        )


def read_metadata(folder: Path) -> dict[str, dict[str, str]]:
    """`metadata.csv` -> row by file name; empty when there is none. Raises DataError without `file`."""
    table = folder / "metadata.csv"
    if not table.exists():
        return {}
    with table.open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    if rows and "file" not in rows[0]:
        raise DataError(
            f"{table} has columns {', '.join(rows[0])}; one must be called 'file' and hold the path of a "
            "picture, relative to the folder"
        )
    return {r["file"]: {k: v for k, v in r.items() if k and k != "file"} for r in rows}
