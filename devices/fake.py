"""A device that replays what it was given, for tests of what uses devices. It is never a result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgecomp.devices.transport import OnLine
from edgecomp.spec import CommandResult

UNKNOWN: dict[str, Any] = {
    "model": "fake",
    "soc": None,
    "cores": 1,
    "isa": "fake",
    "isa_features": [],
    "os": "none",
    "ram_bytes": None,
    "free_bytes": None,
    "governor": None,
    "temperatures": [],
    "emulated": False,
    "glibc": None,
    "python": None,
    "runtimes": {},
    "tools": [],
}


@dataclass
class FakeDevice:
    """Answers every command with `events` as JSON lines (or `text`), `stderr` and `exit_code`."""

    name: str = "fake"
    kind: str = "fake"
    events: Sequence[Mapping[str, Any]] = ()
    text: str = ""
    stderr: str = ""
    exit_code: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    commands: list[tuple[str, ...]] = field(default_factory=list)

    def run(self, argv: Sequence[str], timeout_s: float, on_line: OnLine | None = None) -> CommandResult:
        self.commands.append(tuple(argv))
        stdout = self.text or "".join(json.dumps(event) + "\n" for event in self.events)
        for line in stdout.splitlines():
            if on_line:
                on_line(line)
        return CommandResult(tuple(argv), self.exit_code, stdout, self.stderr)

    def push(self, source: Path, destination: str) -> None:
        self.commands.append(("push", str(source), destination))

    def pull(self, source: str, destination: Path) -> None:
        self.commands.append(("pull", source, str(destination)))

    def stage(self, source: Path) -> str:
        return f"/fake/{source.name}"

    def kill(self, group: int) -> None:
        self.commands.append(("kill", str(group)))

    def python(self) -> tuple[str, ...]:
        return ("python3",)

    def probe(self) -> dict[str, Any]:
        return {**UNKNOWN, **self.facts}

    def close(self) -> None:
        """Nothing is held open."""
