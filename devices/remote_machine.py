"""What boards over SSH and phones over adb have in common, once a command can be run there."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from edgecomp import files
from edgecomp.devices import remote
from edgecomp.devices.faults import TookTooLongError
from edgecomp.devices.transport import OnLine
from edgecomp.spec import CommandResult


class Runs(Protocol):
    """A machine that runs commands."""

    def run(self, argv: Sequence[str], timeout_s: float, on_line: OnLine | None = None) -> CommandResult: ...


def shell(machine: Runs, line: str, timeout_s: float = 60.0) -> CommandResult:
    return machine.run(["sh", "-c", line], timeout_s)


def hash_of(machine: Runs, path: str) -> tuple[int, str] | None:
    """Size and SHA-256 of a file there; None when there is none."""
    return remote.hashed(shell(machine, remote.hashing(path)).stdout)


def each_file(source: Path, destination: str) -> Iterator[tuple[Path, str]]:
    """A file and where it goes; of a folder every file in it, in order."""
    if not source.is_dir():
        yield source, destination
        return
    for file in sorted(p for p in source.rglob("*") if p.is_file()):
        yield file, f"{destination}/{file.relative_to(source).as_posix()}"


def staged_path(workdir: str, source: Path) -> str:
    """Where a file or folder of this content stands, whatever its origin."""
    return f"{workdir}/files/{files.sha256(source)[:16]}/{source.name}"


def runtime_folder(workdir: str) -> str:
    """Where `devices setup` puts runtimes."""
    return f"{workdir}/runtime"


def python_words(workdir: str, interpreter: str, *settings: str) -> tuple[str, ...]:
    """The words that start Python there, with what `devices setup` installed on its path."""
    return ("env", *settings, f"PYTHONPATH={runtime_folder(workdir)}", *shlex.split(interpreter))


def too_long(name: str, argv: Sequence[str], timeout_s: float) -> TookTooLongError:
    return TookTooLongError(
        f"{argv[0]} on device {name!r} took longer than {timeout_s:g} s and was ended there; give it more "
        "time with --timeout, or fewer runs"
    )
