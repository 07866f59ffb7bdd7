"""Decisions of layers kept on disk, so that a long quantization goes on where it was interrupted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from edgecomp import files

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Store:
    """One `.npz` a weight under `folder` (None: nothing is kept), named by weight, inputs and settings."""

    folder: Path | None
    settings: str

    def get(self, name: str, weight: np.ndarray, hessian: np.ndarray) -> Arrays | None:
        """Integers, scale and zero point of this very weight and inputs; None also for a damaged file."""
        path = self._path(name, weight, hessian)
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path) as found:
                return found["values"], found["scale"], found["zero"]
        except (OSError, ValueError, KeyError, BadZipFile):
            return None

    def put(self, name: str, weight: np.ndarray, hessian: np.ndarray, found: Arrays) -> None:
        path = self._path(name, weight, hessian)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, values=found[0], scale=found[1], zero=found[2])

    def _path(self, name: str, weight: np.ndarray, hessian: np.ndarray) -> Path | None:
        if self.folder is None:
            return None
        mark = hashlib.sha256(np.ascontiguousarray(weight).tobytes())
        mark.update(np.ascontiguousarray(hessian).tobytes())
        mark.update(f"{name}|{self.settings}".encode())
        return self.folder / f"{mark.hexdigest()[:24]}.npz"
