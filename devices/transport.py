"""What every device offers beyond `edgecomp.spec.Device`: streamed lines, staging, killing, a Python."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from edgecomp.spec import CommandResult

OnLine = Callable[[str], None]

AGENT = Path(__file__).with_name("agent.py")


class Transport(Protocol):
    """A device that can be told to run commands. Every command has a limit and leaves nothing behind."""

    name: str
    kind: str

    def run(self, argv: Sequence[str], timeout_s: float, on_line: OnLine | None = None) -> CommandResult:
        """Run a command; `on_line` gets each line of stdout as it comes.

        A negative exit code is the signal that ended it. When the limit is over, when the connection is
        lost or on Ctrl-C, the command and all that it started are killed. Raises a branch of DeviceError.
        """
        ...

    def push(self, source: Path, destination: str) -> None:
        """Copy a file or folder; it has its final name only when its SHA-256 agrees."""
        ...

    def pull(self, source: str, destination: Path) -> None: ...

    def stage(self, source: Path) -> str:
        """Make a file or folder available on the device, once for each content; returns its path there."""
        ...

    def kill(self, group: int) -> None:
        """Kill a process group on the device."""
        ...

    def python(self) -> tuple[str, ...]:
        """The words that start Python there, with the folder of `devices setup` on its path."""
        ...

    def probe(self) -> dict[str, Any]:
        """Facts of the machine, as `edgecomp.devices.facts.parse` gives them."""
        ...

    def close(self) -> None: ...


def with_signal(exit_code: int) -> int:
    """A shell's 128 + n as minus n, as Python's subprocess has it."""
    known = {128 + int(s) for s in signal.Signals}
    return -(exit_code - 128) if exit_code in known else exit_code
