"""A causal decoder on a device: the agent's `decode` task, its tokens as they come, and its figures.

What is text here is token ids there: tokenizer, chat template and stop strings stay on this machine.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from edgecomp import files
from edgecomp.devices import health, host
from edgecomp.devices.checkup import RUNTIMES
from edgecomp.devices.faults import RuntimeMissingError
from edgecomp.devices.host import Event
from edgecomp.devices.profiler import EMULATED, device_facts
from edgecomp.devices.transport import Transport
from edgecomp.errors import DeviceError, InputError, MissingError

OnEvent = Callable[[Event], None]


class Watch(Protocol):
    """Readings of a power sensor. `mean`: milliwatts between two moments of time.monotonic()."""

    def mean(self, start: float, end: float) -> float | None: ...


@runtime_checkable
class WatchesPower(Protocol):
    """A device with a power sensor that is read beside a run (a Jetson)."""

    def watched(self) -> contextlib.AbstractContextManager[Watch]: ...


@runtime_checkable
class Counts(Protocol):
    """A device that counts the instructions of a task of the agent (an emulated one)."""

    def count(self, artifact: Path, words: list[str], timeout_s: float) -> int: ...


class DeviceDecoder:
    """An artifact of `export-decoder` on a device. `moments`: when each event of the last run arrived."""

    def __init__(self, device: Transport, artifact: Path, *, threads: int = 1, timeout_s: float = 600.0):
        host.at_least("threads", threads, 1)
        host.at_least("timeout_s", timeout_s, 1)
        self.device, self.artifact = device, artifact
        self.threads, self.timeout_s = threads, timeout_s
        self.events: list[Event] = []
        self.moments: list[float] = []
        self.watch: Watch | None = None
        self._facts: dict[str, Any] | None = None
        self._stopped = False

    @property
    def facts(self) -> dict[str, Any]:
        if self._facts is None:
            self._facts = self.device.probe()
        return self._facts

    @property
    def emulated(self) -> bool:
        return bool(self.facts["emulated"])

    def check(self, cache_bytes: int) -> None:
        """What can be told before anything is copied: the runtime there, and its memory.

        Raises InputError, MissingError (this machine) or RuntimeMissingError.
        """
        if self.artifact.suffix == ".mlpackage":
            _check_mac(self.device, self.facts)
        else:
            _check_runtime(self.device, self.facts, self.artifact)
        needed, there = files.size_bytes(self.artifact) + cache_bytes, self.facts["ram_bytes"]
        if there is not None and needed > there:
            raise InputError(
                f"{self.artifact.name} and its cache need at least {needed:,} bytes of memory and device "
                f"{self.device.name!r} has {there:,}; export it with fewer bits, less --room or --cache int8"
            )

    def run(self, request: Mapping[str, Any], on_event: OnEvent | None = None) -> None:
        """Run the task in a fresh process; `events` are its lines. Raises a branch of DeviceError.

        What `on_event` raises ends the work there, and is raised here.
        """
        self.events, self.moments, self._stopped = [], [], False
        raised: list[Exception] = []

        def take(line: str) -> None:
            for event in host.event_of(line):
                self.events.append(event)
                self.moments.append(time.monotonic())
                try:
                    if on_event and not raised:
                        on_event(event)
                except Exception as error:  # the transport may call from a thread of its own
                    raised.append(error)
                    self.stop()

        agent, model = self.device.stage(host.AGENT), self.device.stage(self.artifact)
        with _staged(self.device, request) as there, self._power():
            words = ["decode", model, "--request", there, "--threads", str(self.threads)]
            argv = [*host.environment(self.threads), *self.device.python(), agent, *words]
            result = self.device.run(argv, self.timeout_s, on_line=take)
        if raised:
            raise raised[0]
        host.check(self.device, self.artifact, self.events, result)

    def stop(self) -> None:
        """Ask the process there to end after the token at hand."""
        pid = self.of("start").get("pid")
        if pid and not self._stopped:
            self._stopped = True
            with contextlib.suppress(DeviceError):
                self.device.run(["sh", "-c", f"kill -TERM {int(pid)} 2>/dev/null; true"], 20)

    def instructions(self, request: Mapping[str, Any]) -> int:
        """Instructions of one token after the request's first context. Raises InputError."""
        if not isinstance(self.device, Counts):
            raise InputError(
                f"device {self.device.name!r} cannot count instructions; an emulated one can (kind qemu)"
            )
        with _staged(self.device, request) as there:
            words = ["decode", str(self.artifact.resolve()), "--request", there]
            return self.device.count(self.artifact, words, self.timeout_s)

    @contextlib.contextmanager
    def _power(self) -> Iterator[None]:
        self.watch = None
        if isinstance(self.device, WatchesPower):
            with self.device.watched() as self.watch:
                yield
        else:
            yield

    def of(self, name: str) -> Event:
        """The first event of that name, or an empty one."""
        return next((event for event in self.events if event["event"] == name), {})

    def between(self, start: int, end: int) -> float | None:
        """Mean milliwatts of the device between two events, by their numbers; None without a sensor."""
        return self.watch.mean(self.moments[start], self.moments[end]) if self.watch else None

    def described(self) -> dict[str, Any]:
        """`device`, `runtime`, `threads`, `init_ms`, `peak_rss_bytes`, `warnings`, as in a profile.

        None: not measured, which is every time and memory of an emulated device.
        """
        figures = host.figures(self.events)
        real = host.Figures(runtime=figures.runtime) if self.emulated else figures
        doubts = (
            [EMULATED]
            if self.emulated
            else health.warnings(
                real.before, real.after, other_cores=real.other_cores, swapped=real.swapped_bytes
            )
        )
        return {
            "device": device_facts(self.device, self.facts, real),
            "artifact": str(self.artifact),
            "runtime": dict(figures.runtime),
            "threads": self.threads,
            "init_ms": real.init_ms,
            "peak_rss_bytes": real.peak_rss_bytes,
            "warnings": doubts,
        }


@contextlib.contextmanager
def _staged(device: Transport, request: Mapping[str, Any]) -> Iterator[str]:
    """The request as a file on the device; the agent removes it when it has read it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(dict(request)))
        yield device.stage(path)


def _check_runtime(device: Transport, facts: Mapping[str, Any], artifact: Path) -> None:
    kind = {".onnx": "onnx", ".tflite": "tflite"}[artifact.suffix]
    have = facts["runtimes"]
    lacks = "" if any(package in have for package in RUNTIMES[kind]) else f"a runtime for {kind} files"
    if facts["python"] and not lacks and "numpy" in have:
        return
    what = "Python" if not facts["python"] else lacks or "NumPy"
    if device.kind == "local":
        raise MissingError(
            f"{artifact.name} cannot be run here without {what}: pip install 'edgecomp[{kind}]'"
        )
    way = (
        f"`edgecomp devices setup {device.name}` installs it there"
        if facts["python"]
        else "install Python 3.9 or newer there (on Android: in Termux, named with --set python=PATH)"
    )
    raise RuntimeMissingError(
        f"{artifact.name} cannot generate on device {device.name!r}, which has no {what}; {way}"
    )


def _check_mac(device: Transport, facts: Mapping[str, Any]) -> None:
    if not str(facts.get("os") or "").startswith(("macOS", "Mac OS X")):
        raise InputError(
            f"Core ML runs on Apple's systems only, and device {device.name!r} has {facts.get('os')}; name a "
            "Mac (`edgecomp devices add NAME --apple USER@HOST`), generate on this machine without --device "
            "(the reference executor), or export the decoder to ONNX or TFLite"
        )
    if getattr(device, "target", "mac") != "mac":
        raise InputError(
            f"device {device.name!r} is an {getattr(device, 'target', '')}, where edgecomp only times whole "
            "packages; generate on its Mac (--set target=mac)"
        )
    if "coremltools" not in facts["runtimes"]:
        raise RuntimeMissingError(
            f"device {device.name!r} has no coremltools, which runs a package there: pip install coremltools "
            "numpy (on the Mac), and name that Python with --set python=PATH"
        )
