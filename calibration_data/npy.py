"""Reading rows of a `.npy` array, plain or inside an `.npz`, without loading it whole."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from edgecomp.errors import DataError

# An array of up to this many bytes is read once and kept; a larger one is read row by row.
KEEP_BYTES = 64 << 20


class RowReader:
    """Rows of one stored array. `shape`, `dtype` are the whole array's; `rows(indices)` reads some.

    Raises DataError when the file is damaged, holds Python objects, or is in Fortran order and large.
    """

    def __init__(self, path: Path, member: str | None = None) -> None:
        self.path = path
        self.member = member
        self.name = f"{path}[{member.removesuffix('.npy')}]" if member else str(path)
        with self._stream() as stream:
            self.shape, self.fortran, self.dtype = self._header(stream)
            self._start = stream.tell()
        if self.dtype.hasobject:
            raise DataError(f"{self.name} holds Python objects; expected numbers: save an array of one dtype")
        self._row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self._kept = self._whole() if self._small() else None

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows in the order asked for, read from the file in ascending order."""
        if self._kept is not None:
            return self._kept[indices]
        out = np.empty((len(indices), *self.shape[1:]), dtype=self.dtype)
        with self._stream() as stream:
            for position in np.argsort(indices, kind="stable"):
                stream.seek(self._start + int(indices[position]) * self._row_bytes)
                out[position] = self._array(self._exactly(stream, self._row_bytes), self.shape[1:])
        return out

    def _small(self) -> bool:
        total = self._row_bytes * len(self)
        if self.fortran and total > KEEP_BYTES:
            raise DataError(
                f"{self.name} is stored in Fortran order and is {total >> 20} MB: its rows cannot be read "
                "one by one; save it with numpy.ascontiguousarray"
            )
        return total <= KEEP_BYTES

    def _whole(self) -> np.ndarray:
        with self._stream() as stream:
            stream.seek(self._start)
            raw = self._exactly(stream, self._row_bytes * len(self) if self.shape else self.dtype.itemsize)
        if self.fortran:
            return np.frombuffer(raw, self.dtype).reshape(self.shape, order="F")
        return self._array(raw, self.shape)

    def _array(self, raw: bytes, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(raw, self.dtype).reshape(shape)

    def _exactly(self, stream: IO[bytes], count: int) -> bytes:
        try:
            raw = stream.read(count)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DataError(f"{self.name} is damaged ({error}); save it again") from error
        if len(raw) < count:
            raise DataError(
                f"{self.name} is cut short: {count} bytes expected, {len(raw)} found; save it again"
            )
        return raw

    def _header(self, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        try:
            version = np.lib.format.read_magic(stream)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            return read(stream)
        except (ValueError, EOFError, OSError, zlib.error, zipfile.BadZipFile) as error:
            raise DataError(f"{self.name} is not a NumPy array ({error}); save it with numpy.save") from error

    def _stream(self) -> IO[bytes]:
        if self.member is None:
            return self.path.open("rb")
        archive = zipfile.ZipFile(self.path)
        try:
            return archive.open(self.member)
        finally:
            archive.close()  # the open member keeps the file alive


def members(path: Path) -> dict[str, str]:
    """Array name -> member of an `.npz`. Raises DataError when it is not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {n.removesuffix(".npy"): n for n in archive.namelist() if n.endswith(".npy")}
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"{path} is not an .npz archive ({error}); save it with numpy.savez_compressed(path, inputs=..., "
            "targets=...)"
        ) from error
