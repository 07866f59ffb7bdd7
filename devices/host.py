"""The host side of the agent: starts `agent.py` on a device, reads its JSON lines, and names what failed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgecomp.devices.faults import (
    DroppedError,
    ModelCrashError,
    ModelRefusedError,
    OutputFormError,
    RuntimeMissingError,
    last_lines,
)
from edgecomp.devices.transport import AGENT, Transport
from edgecomp.errors import DataError, DeviceError, InputError, MissingError
from edgecomp.spec import CommandResult

Event = Mapping[str, Any]
Progress = Callable[[str], None]

# What brings the runtime of each format, for the message about a missing one.
_WHEELS = {".tflite": "ai-edge-litert", ".onnx": "onnxruntime", ".mlpackage": "coremltools"}
_EXTRAS = {".tflite": "tflite", ".onnx": "onnx", ".mlpackage": "coreml"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure. Times in seconds; `runs` and `seconds` are both lower bounds of the timed part.

    `runtime`, `accelerator`: as the agent takes them. `pin`: cores that the process may use. `timeout_s`: the
    limit of one artifact. Raises InputError for a value out of range.
    """

    threads: int = 1
    runs: int = 50
    seconds: float = 1.0
    warmup_seconds: float = 5.0
    runtime: str = "auto"
    accelerator: str = "auto"
    pin: tuple[int, ...] = ()
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("runs", 1), ("seconds", 0), ("timeout_s", 1)):
            at_least(name, getattr(self, name), least)


def at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise InputError(f"{name} is {value}; expected {least} or more")


@dataclass(frozen=True)
class Request(Settings):
    """What to measure, and how. `against`: a second artifact that takes turns with the first.

    `op_runs`: runs of the separate session for per-op times (0: none). `sustain_s`: how long to run without a
    pause.
    """

    artifact: Path
    against: Path | None = None
    inputs: Path | None = None
    op_runs: int = 10
    sustain_s: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("sustain_s", self.sustain_s, 0)

    def words(self, model: str, against: str | None, inputs: str | None) -> list[str]:
        """The agent's arguments, with paths as they are on the device."""
        words = ["profile", model, "--threads", str(self.threads), "--runs", str(self.runs)]
        words += ["--seconds", str(self.seconds), "--warmup-seconds", str(self.warmup_seconds)]
        words += ["--runtime", self.runtime, "--accelerator", self.accelerator]
        words += ["--op-runs", str(self.op_runs), "--sustain", str(self.sustain_s)]
        words += ["--against", against] if against else []
        words += ["--inputs", inputs] if inputs else []
        words += ["--pin", ",".join(str(n) for n in self.pin)] if self.pin else []
        return words


@dataclass(frozen=True)
class Figures:
    """What was measured of one artifact. `samples_ms`: every timed run, in order. None: not measured.

    `summary`: statistics in ms of a tool that tells no samples (min, mean, p50, p90, p95, p99, max).
    """

    runtime: Mapping[str, Any]
    samples_ms: tuple[float, ...] = ()
    summary: Mapping[str, float] | None = None
    init_ms: float | None = None
    first_ms: float | None = None
    warm_after_runs: int | None = None
    stable: bool | None = None
    baseline_rss_bytes: int | None = None
    load_rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    pss_bytes: int | None = None
    swapped_bytes: int | None = None
    ops: Sequence[Mapping[str, Any]] | None = None
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    other_cores: float | None = None
    energy_mj: float | None = None
    instructions: int | None = None
    curve: Sequence[Mapping[str, Any]] = ()
    notes: tuple[str, ...] = ()


def environment(threads: int) -> list[str]:
    """Words that start a command with the thread counts of numeric libraries set, on any POSIX machine."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return ["env", *[f"{name}={threads}" for name in names], "PYTHONUNBUFFERED=1"]


def call_agent(
    device: Transport,
    words: Sequence[str],
    *,
    threads: int,
    timeout_s: float,
    progress: Progress | None = None,
) -> tuple[list[Event], CommandResult]:
    """Run the agent on a device; returns its events and the finished command."""
    agent = device.stage(AGENT)
    events: list[Event] = []

    def take(line: str) -> None:
        for event in event_of(line):
            events.append(event)
            if progress:
                progress(str(event["event"]))

    argv = [*environment(threads), *device.python(), agent, *words]
    return events, device.run(argv, timeout_s, on_line=take)


def event_of(line: str) -> list[Event]:
    """The event that a line holds; none for any other line."""
    try:
        found = json.loads(line)
    except ValueError:
        return []
    return [found] if isinstance(found, dict) and "event" in found else []


def check(device: Transport, artifact: Path, events: Sequence[Event], result: CommandResult) -> None:
    """Raise what an unfinished agent means: missing runtime, refused model, signal, lost connection."""
    errors = [event for event in events if event["event"] == "error"]
    if errors:
        raise _named(device, artifact, errors[0])
    if events and events[-1]["event"] == "done":
        return
    if result.exit_code < 0:
        raise ModelCrashError(device.name, str(artifact), -result.exit_code, result.stderr)
    if result.exit_code in (126, 127) or "No module named" in result.stderr:
        raise _missing(
            device,
            artifact,
            f"cannot start the agent ({' '.join(device.python())}){last_lines(result.stderr, 3)}",
        )
    if result.exit_code != 0:
        raise DeviceError(
            f"the agent on device {device.name!r} failed with exit code {result.exit_code} on {artifact}"
            f"{last_lines(result.stderr)}"
        )
    if events:
        raise DroppedError(
            f"device {device.name!r} went silent while it ran {artifact} (last: {events[-1]['event']}); "
            "check its cable, network and power, then run the same command again"
        )
    raise OutputFormError(f"the agent on device {device.name!r}", result.stdout + result.stderr)


def _named(device: Transport, artifact: Path, error: Event) -> Exception:
    message = str(error.get("message", ""))
    kind = error.get("kind")
    if kind == "runtime-missing":
        return _missing(device, artifact, message)
    if kind == "inputs":
        return DataError(message)
    if kind == "usage":
        return InputError(message)
    return ModelRefusedError(f"device {device.name!r} cannot run {artifact}: {message}")


def _missing(device: Transport, artifact: Path, message: str) -> Exception:
    if device.kind == "local":
        extra = _EXTRAS.get(artifact.suffix, "all")
        return MissingError(f"{artifact.name} cannot be run here: {message}; pip install 'edgecomp[{extra}]'")
    wheel = _WHEELS.get(artifact.suffix, "numpy")
    return RuntimeMissingError(
        f"{artifact.name} cannot be run on device {device.name!r}: {message}; "
        f"`edgecomp devices setup {device.name}` installs {wheel} there"
    )


def measure(device: Transport, request: Request, progress: Progress | None = None) -> list[Figures]:
    """Measure one artifact, or two that take turns, with the agent in a fresh process on the device.

    Returns one Figures for each. Raises a branch of DeviceError, MissingError (local), DataError.
    """
    model = device.stage(request.artifact)
    against = device.stage(request.against) if request.against else None
    inputs = device.stage(request.inputs) if request.inputs else None
    events, result = call_agent(
        device,
        request.words(model, against, inputs),
        threads=request.threads,
        timeout_s=request.timeout_s + request.sustain_s,
        progress=progress,
    )
    check(device, request.artifact, events, result)
    return [figures(events, index) for index in range(2 if request.against else 1)]


def figures(events: Sequence[Event], index: int = 0) -> Figures:
    """The events of one model as figures. Memory is only told when the process held one model."""
    of_model = [e for e in events if e.get("model", index) == index]
    one = {e["event"]: e for e in of_model}
    alone = not any(e.get("model") == 1 for e in events)
    runtime, init, after = one.get("runtime", {}), one.get("init", {}), one.get("after", {})
    memory = one.get("memory", {}) if alone else {}
    joules, runs = after.get("joules"), after.get("runs")
    samples = [ms for e in of_model if e["event"] == "samples" for ms in e["ms"]]
    return Figures(
        runtime={
            "name": runtime.get("name"),
            "version": runtime.get("version"),
            "accelerator": init.get("accelerator"),
        },
        samples_ms=tuple(samples),
        init_ms=init.get("ms"),
        first_ms=one.get("first", {}).get("ms"),
        warm_after_runs=len(one["warmup"]["ms"]) if "warmup" in one else None,
        stable=one.get("warmup", {}).get("stable"),
        baseline_rss_bytes=init.get("before", {}).get("rss") if alone else None,
        load_rss_bytes=init.get("after", {}).get("rss") if alone else None,
        peak_rss_bytes=memory.get("peak"),
        pss_bytes=memory.get("pss"),
        swapped_bytes=memory.get("swapped"),
        ops=one.get("ops", {}).get("ops"),
        before=one.get("start", {}).get("state", {}),
        after=after.get("state", {}),
        other_cores=after.get("other_cores"),
        energy_mj=joules * 1000 / runs if alone and joules is not None and runs else None,
        curve=[e for e in of_model if e["event"] == "curve"],
    )
