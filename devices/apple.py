"""A Mac over SSH that times `.mlpackage` files on itself or on an attached iPhone or iPad.

coremltools' own benchmarker does the work (`apple_agent.py`, which runs there); other formats use the
agent. Not yet verified on real hardware: docs/devices.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from edgecomp.devices import host
from edgecomp.devices.host import Event, Figures, Progress, Request
from edgecomp.devices.ssh import SshDevice
from edgecomp.errors import InputError

AGENT = Path(__file__).with_name("apple_agent.py")
TARGETS = ("mac", "iphone", "ipad")


class AppleDevice(SshDevice):
    """`target`: mac, iphone or ipad. `team`: the development team that signs the runner app on a phone."""

    kind = "apple"
    SETTINGS: ClassVar[dict[str, type]] = {**SshDevice.SETTINGS, "target": str, "team": str}
    target = "mac"
    team = ""

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, Any]) -> Self:
        device = super().from_settings(name, settings)
        device.target = str(settings.get("target", "mac"))
        device.team = str(settings.get("team", ""))
        if device.target not in TARGETS:
            raise InputError(
                f"target of device {name!r} is {device.target!r}; expected one of {', '.join(TARGETS)}"
            )
        if device.target != "mac" and not device.team:
            raise InputError(f"device {name!r} is an {device.target}: its runner app needs --set team=TEAM")
        return device

    def measure(self, request: Request, progress: Progress | None = None) -> list[Figures]:
        if request.artifact.suffix != ".mlpackage":
            return host.measure(self, request, progress)
        if request.against:
            raise InputError("the Core ML benchmarker runs one package at a time; profile them one by one")
        model, agent = self.stage(request.artifact), self.stage(AGENT)
        words = ["--target", self.target, "--units", request.accelerator, "--runs", str(request.runs)]
        words += ["--op-runs", str(request.op_runs), *(["--team", self.team] if self.team else [])]
        events: list[Event] = []
        argv = [*host.environment(request.threads), *self.python(), agent, model, *words]
        result = self.run(argv, request.timeout_s, lambda line: events.extend(host.event_of(line)))
        host.check(self, request.artifact, events, result)
        return [host.figures(events)]
