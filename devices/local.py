"""This machine as a device: every command is a fresh process in a group of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from edgecomp.devices import facts
from edgecomp.devices.faults import TookTooLongError, UnreachableError
from edgecomp.devices.transport import OnLine
from edgecomp.spec import CommandResult

_GRACE_S = 2.0


class LocalDevice:
    """`edgecomp.spec.Device` on the host. Artifacts are used where they are; nothing is copied."""

    kind = "local"
    SETTINGS: ClassVar[dict[str, type]] = {}

    def __init__(self, name: str = "local") -> None:
        self.name = name
        self._running: set[int] = set()

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, Any]) -> LocalDevice:
        return cls(name)

    def run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        on_line: OnLine | None = None,
        on_error_line: OnLine | None = None,
    ) -> CommandResult:
        """As every transport; `on_error_line` gets each line of stderr as it comes."""
        try:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise UnreachableError(
                f"cannot start {argv[0]!r} on this machine: {error.strerror}; check that it is installed and "
                "may be executed"
            ) from error
        self._running.add(process.pid)
        out: list[str] = []
        err: list[str] = []
        readers = [
            threading.Thread(target=_collect, args=(process.stdout, out, on_line), daemon=True),
            threading.Thread(target=_collect, args=(process.stderr, err, on_error_line), daemon=True),
        ]
        try:
            for reader in readers:
                reader.start()
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TookTooLongError(
                f"{argv[0]} on device {self.name!r} took longer than {timeout_s:g} s and was killed; give it "
                "more time with --timeout, or fewer runs"
            ) from None
        finally:
            self.kill(process.pid)
            process.wait()
            self._running.discard(process.pid)
            for reader in readers:
                reader.join(_GRACE_S)
            for stream in (process.stdout, process.stderr):
                if stream:
                    stream.close()
        return CommandResult(tuple(argv), process.returncode, "".join(out), "".join(err))

    def kill(self, group: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)

    def push(self, source: Path, destination: str) -> None:
        if source.is_dir():
            shutil.copytree(source, destination, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, destination)

    def pull(self, source: str, destination: Path) -> None:
        self.push(Path(source), str(destination))

    def stage(self, source: Path) -> str:
        return str(source.resolve())

    def python(self) -> tuple[str, ...]:
        return (sys.executable,)

    def probe(self) -> dict[str, Any]:
        return facts.parse(self.run(["sh", "-c", facts.script(self.python())], 30).stdout)

    def close(self) -> None:
        """Kill what still runs (another thread may have started it)."""
        for group in tuple(self._running):
            self.kill(group)


def _collect(stream: Any, lines: list[str], on_line: OnLine | None) -> None:
    for line in stream:
        lines.append(line)
        if on_line:
            on_line(line.rstrip("\n"))
