"""Writing files so that nothing half-written is ever found under its final name."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgecomp.errors import OutputError


@contextmanager
def atomic(final: Path) -> Iterator[Path]:
    """Yield a temporary path beside `final`; move it into place on success, remove it on any failure.

    Works for files and folders (`.mlpackage`). Raises OutputError when the folder cannot be written or
    is full.
    """
    temporary = final.parent / f".{os.getpid()}.partial.{final.name}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        if final.is_dir():
            shutil.rmtree(final)
        temporary.replace(final)
    except OSError as error:
        raise OutputError(
            f"cannot write {final}: {error.strerror or error}; check that the folder can be written and "
            "has room, or choose another with --out"
        ) from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def check_writable(folder: Path) -> None:
    """Fail before long work starts when `folder` cannot be made or written. Raises OutputError."""
    probe = folder / f".{os.getpid()}.write-check"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"edgecomp")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"cannot write into {folder}: {error.strerror or error}; check that it is a folder that can be "
            "written and has room, or choose another"
        ) from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, or of a folder: relative names and contents, in sorted order."""
    digest = hashlib.sha256()
    if path.is_file():
        _feed(digest, path)
        return digest.hexdigest()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        _feed(digest, file)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
