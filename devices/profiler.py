"""Latency, memory, per-op time and energy of an artifact on a device, and whether they can be trusted.

`profile` returns the JSON object that docs/contract.md describes. None: not measured. Percentiles are those
of `edgecomp.numerics.statistics.percentile` (linear interpolation); `ci95` is the block-bootstrap interval
of the median.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from edgecomp import door, files, manifest
from edgecomp.devices import health, host
from edgecomp.devices.host import Figures, Progress, Request, Settings
from edgecomp.devices.transport import Transport
from edgecomp.errors import ArtifactError, InputError, UnknownNameError
from edgecomp.numerics import statistics

SUFFIXES = (".tflite", ".onnx", ".mlpackage")
RUNTIMES = {
    ".tflite": ("auto", "ai_edge_litert", "tflite_runtime", "tensorflow"),
    ".onnx": ("auto", "onnxruntime", "trtexec"),
    ".mlpackage": ("auto", "coremltools"),
}

EMULATED = "emulated: this machine is emulated, so times and memory were not reported"

# Latency of machines that are emulated is the emulator's: one warm run shows that the artifact works.
_SHORT: dict[str, Any] = {"runs": 1, "seconds": 0.0, "warmup_seconds": 0.0, "op_runs": 0, "sustain_s": 0.0}


@runtime_checkable
class OwnRunner(Protocol):
    """A device with a runner of its own (trtexec, benchmark_model, Core ML) instead of the agent."""

    def measure(self, request: Request, progress: Progress | None = None) -> list[Figures]: ...


@runtime_checkable
class CountsInstructions(Protocol):
    """A device that can count the instructions of one inference."""

    def instructions(self, request: Request) -> int: ...


def profile(
    device: Transport,
    artifact: Path,
    settings: Settings | None = None,
    *,
    inputs: Path | None = None,
    op_runs: int = 10,
    sustain_s: float = 0.0,
    instructions: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Profile one artifact in a fresh process on `device`.

    `inputs`: an .npz with one array for each input, as the artifact takes them; else its first golden sample,
    else random ones. `op_runs`, `sustain_s`: see Request. `instructions`: count them (emulated Arm).
    Raises ArtifactError, MissingError (local runtime), or a branch of DeviceError.
    """
    how = vars(settings or Settings())
    request = Request(checked(artifact), inputs=inputs, op_runs=op_runs, sustain_s=sustain_s, **how)
    check_runtime(request)
    with tempfile.TemporaryDirectory() as folder:
        if inputs is None:
            request = replace(request, inputs=golden_inputs(artifact, Path(folder)))
        return _profiled(device, request, instructions=instructions, progress=progress)


def golden_inputs(artifact: Path, folder: Path) -> Path | None:
    """The first golden sample as the artifact takes it, in an .npz; None when none travels with it.

    Real inputs matter where values are indices; times of most networks do not depend on them.
    """
    if not manifest.path_of(artifact).exists():
        return None
    facts = manifest.read(artifact)
    golden = artifact.with_name(facts.golden) if facts.golden else None
    if golden is None or not golden.exists():
        return None
    with np.load(golden, allow_pickle=False) as archive:
        arrays = {
            f"input_{i}": door.into(archive[f"input_{i}"][: spec.shape[0]], spec)
            for i, spec in enumerate(facts.inputs)
            if f"input_{i}" in archive.files
        }
    if len(arrays) < len(facts.inputs):
        return None
    np.savez(folder / "inputs.npz", **arrays)  # type: ignore[arg-type]
    return folder / "inputs.npz"


def _profiled(
    device: Transport, request: Request, *, instructions: bool, progress: Progress | None
) -> dict[str, Any]:
    facts = device.probe()
    artifact = request.artifact
    if artifact.suffix == ".mlpackage" and not _is_mac(facts):
        return described(device, facts, request, Figures(runtime=_no_runtime()), _reference_only(facts))
    if facts["emulated"]:
        request = replace(request, **_SHORT)
    measured = _measure(device, request, progress)[0]
    if instructions:
        if not isinstance(device, CountsInstructions):
            raise InputError(
                f"device {device.name!r} cannot count instructions; an emulated one can (kind lab)"
            )
        measured = replace(measured, instructions=device.instructions(request))
    return described(device, facts, request, measured, [])


def _measure(device: Transport, request: Request, progress: Progress | None) -> list[Figures]:
    if isinstance(device, OwnRunner):
        return device.measure(request, progress)
    return host.measure(device, request, progress)


def checked(artifact: Path) -> Path:
    """The artifact, when it exists, has a known suffix, and agrees with its manifest if it has one."""
    if artifact.suffix not in SUFFIXES:
        raise ArtifactError(
            f"{artifact} does not end in one of {', '.join(SUFFIXES)}; profile takes these files"
        )
    if not artifact.exists():
        raise ArtifactError(
            f"no artifact at {artifact}; check the path, or export one with `edgecomp export`"
        )
    if manifest.path_of(artifact).exists():
        manifest.read(artifact)
    return artifact


def check_runtime(request: Request) -> None:
    """Raises UnknownNameError for a runtime that opens no file of the artifact's kind."""
    for artifact in (request.artifact, request.against):
        if artifact is not None and request.runtime not in RUNTIMES[artifact.suffix]:
            what = f"runtime of {artifact.suffix} files"
            raise UnknownNameError(what, request.runtime, RUNTIMES[artifact.suffix])


def _is_mac(facts: Mapping[str, Any]) -> bool:
    return str(facts.get("os") or "").startswith(("macOS", "Mac OS X"))


def _no_runtime() -> dict[str, Any]:
    return {"name": None, "version": None, "accelerator": None}


def _reference_only(facts: Mapping[str, Any]) -> list[str]:
    return [
        f"not measured: Core ML runs on Apple's systems only and this device has {facts.get('os')}; the "
        "reference executor's time would be no device's latency (profile on a Mac: `edgecomp devices add`)"
    ]


def described(
    device: Transport, facts: Mapping[str, Any], request: Request, measured: Figures, extra: list[str]
) -> dict[str, Any]:
    """Figures and facts as the contract's JSON object."""
    emulated = bool(facts["emulated"])
    real = Figures(runtime=measured.runtime, ops=measured.ops) if emulated else measured
    spread = latency(real.samples_ms) or summarized(real.summary)
    noise = verdict(real.samples_ms, spread)
    return {
        "device": device_facts(device, facts, real),
        "artifact": str(request.artifact),
        "target": _target(request.artifact),
        "runtime": dict(measured.runtime),
        "threads": request.threads,
        "pinned_cores": list(request.pin) or None,
        "init_ms": real.init_ms,
        "first_ms": real.first_ms,
        "warmup": {"runs": real.warm_after_runs, "stable": real.stable},
        "latency_ms": spread,
        "noise": noise,
        "throughput_per_s": throughput(spread),
        "peak_rss_bytes": real.peak_rss_bytes,
        "load_rss_bytes": real.load_rss_bytes,
        "baseline_rss_bytes": real.baseline_rss_bytes,
        "pss_bytes": real.pss_bytes,
        "model_bytes": files.size_bytes(request.artifact),
        "ops": [dict(op) for op in measured.ops] if measured.ops is not None else None,
        "thermal": _thermal(real),
        "energy_mj": real.energy_mj,
        "instructions": measured.instructions,
        "sustained": sustained(real),
        "warnings": extra + _doubts(real, noise, emulated) + list(measured.notes),
    }


def latency(samples: tuple[float, ...]) -> dict[str, Any] | None:
    """Percentiles of the timed runs in milliseconds, with every sample; None when there are none."""
    if not samples:
        return None
    interval = statistics.median_interval(samples)
    return {
        "samples": list(samples),
        "min": min(samples),
        "mean": sum(samples) / len(samples),
        **{f"p{q}": statistics.percentile(samples, q) for q in (50, 90, 95, 99)},
        "max": max(samples),
        "ci95": [interval.low, interval.high],
    }


def summarized(summary: Mapping[str, float] | None) -> dict[str, Any] | None:
    """The same keys from a tool's own statistics: no samples and no interval."""
    if not summary:
        return None
    names = ("min", "mean", "p50", "p90", "p95", "p99", "max")
    return {"samples": None, **{name: summary.get(name) for name in names}, "ci95": None}


def throughput(spread: Mapping[str, Any] | None) -> float | None:
    """Inferences a second, one after the other: from the median, else from the mean."""
    typical = (spread or {}).get("p50") or (spread or {}).get("mean")
    return 1000 / typical if typical else None


def verdict(samples: tuple[float, ...], spread: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The noise verdict that belongs to `spread = latency(samples)`."""
    if not samples or spread is None or spread["p50"] <= 0:
        return None
    found = statistics.noise(samples, interval=statistics.Interval(*spread["ci95"]))
    return {
        "verdict": found.verdict,
        "interval_width": found.interval_width,
        "drift": found.drift,
        "spread": found.spread,
    }


def device_facts(device: Transport, facts: Mapping[str, Any], measured: Figures) -> dict[str, Any]:
    """What a profile says of the device."""
    return {
        "name": device.name,
        "kind": device.kind,
        "model": facts.get("model"),
        "soc": facts.get("soc"),
        "isa": "+".join([str(facts["isa"]), *facts["isa_features"]]) if facts.get("isa") else None,
        "cores": facts.get("cores"),
        "os": facts.get("os"),
        "ram_bytes": facts.get("ram_bytes"),
        "governor": health.governor(measured.after) or facts.get("governor"),
        "emulated": bool(facts["emulated"]),
    }


def _target(artifact: Path) -> str | None:
    return manifest.read(artifact).target if manifest.path_of(artifact).exists() else None


def _thermal(measured: Figures) -> dict[str, Any]:
    reasons = health.throttling(measured.before, measured.after) if measured.after else None
    return {
        "throttled": bool(reasons) if reasons is not None else None,
        "start_c": health.temperature(measured.before),
        "end_c": health.temperature(measured.after),
    }


def sustained(measured: Figures) -> dict[str, Any] | None:
    """The curve of a long run: a median for each slot, and the share of the first slot's speed that was kept.

    `retained`: mean of the first tenth of the medians over the mean of the last tenth; 1.0 is no loss.
    """
    if not measured.curve:
        return None
    medians = [float(point["ms"]) for point in measured.curve]
    tenth = max(1, len(medians) // 10)
    points = [
        {"t_s": p["t_s"], "ms": p["ms"], "temperature_c": health.temperature(p.get("state", {}))}
        for p in measured.curve
    ]
    return {"points": points, "retained": sum(medians[:tenth]) / sum(medians[-tenth:])}


def _doubts(measured: Figures, noise: Mapping[str, Any] | None, emulated: bool) -> list[str]:
    """Warnings, a sentence each; the word before the colon names the kind."""
    if emulated:
        return [EMULATED]
    if not measured.samples_ms and not measured.summary:
        return []
    found = health.warnings(
        measured.before,
        measured.after,
        other_cores=measured.other_cores,
        swapped=measured.swapped_bytes,
    )
    if measured.stable is False:
        found.append("not warm: times were still changing when the warm-up ended (longer: --warmup)")
    if noise and noise["verdict"] != "steady":
        found.append(
            f"{noise['verdict']}: the median's interval is {noise['interval_width']:.1%} of it wide and "
            f"it drifted by {noise['drift']:+.1%}; run longer on a quieter machine"
        )
    return found


def compare(
    device: Transport,
    a: Path,
    b: Path,
    settings: Settings | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Interleave two artifacts of any format in one process and say which is faster.

    `ratio` is median(b) / median(a) with its paired block-bootstrap interval `ci95`; `faster` is "a", "b", or
    None when the interval holds 1: it cannot be told. Raises as `profile` does.
    """
    request = Request(checked(a), against=checked(b), op_runs=0, **vars(settings or Settings()))
    check_runtime(request)
    facts = device.probe()
    if facts["emulated"]:
        raise InputError(
            f"device {device.name!r} is emulated; its times say nothing: compare on a real device"
        )
    if not _is_mac(facts) and ".mlpackage" in (a.suffix, b.suffix):
        raise InputError("an .mlpackage is timed on Apple's systems only; compare on a Mac")
    first, second = _measure(device, request, progress)
    result = statistics.compare_medians(first.samples_ms, second.samples_ms)
    targets = _target(a), _target(b)
    spreads = latency(first.samples_ms), latency(second.samples_ms)
    slower = quantized_is_slower(targets[0], targets[1], result.faster)
    return {
        "device": device_facts(device, facts, first),
        "a": {"artifact": str(a), "target": targets[0], "latency_ms": spreads[0]},
        "b": {"artifact": str(b), "target": targets[1], "latency_ms": spreads[1]},
        "ratio": result.ratio,
        "ci95": [result.interval.low, result.interval.high],
        "faster": result.faster,
        "warnings": ([slower] if slower else [])
        + _doubts(first, verdict(first.samples_ms, spreads[0]), False),
    }


_INT8 = ("tflite-int8", "onnx-qdq", "tflite-dynamic", "onnx-dynamic", "coreml-int8", "tensorrt-int8")
_FLOAT = ("tflite-fp32", "tflite-fp16", "onnx-fp32", "coreml-fp16")
INT8_SLOWER = "int8 slower than float"


def quantized_is_slower(target_a: str | None, target_b: str | None, faster: str | None) -> str | None:
    """The named warning when the float artifact of a pair is the faster one."""
    pair = {"a": (target_a, target_b), "b": (target_b, target_a)}
    if faster is None:
        return None
    winner, loser = pair[faster]
    if winner in _FLOAT and loser in _INT8:
        return (
            f"{INT8_SLOWER}: {loser} loses to {winner} on this device; integer kernels need dot-product "
            "instructions (Arm dotprod or i8mm, x86 VNNI) and a runtime that uses them"
        )
    return None


def _interval(profile: Mapping[str, Any]) -> list[float]:
    return (profile["latency_ms"] or {}).get("ci95") or []


def flag_slow_int8(profiles: list[dict[str, Any]]) -> None:
    """Add the named warning to each int8 profile that a float one of the same device and format beats.

    Only when their intervals do not overlap: the runs were not interleaved (`compare` does that).
    """
    for p in profiles:
        for q in profiles:
            same = p["device"]["name"] == q["device"]["name"]
            if not same or not p["target"] or not q["target"] or not _interval(p) or not _interval(q):
                continue
            if p["target"].split("-")[0] != q["target"].split("-")[0]:
                continue
            clear = _interval(p)[0] > _interval(q)[1]
            slower = quantized_is_slower(q["target"], p["target"], "a" if clear else None)
            if slower:
                p["warnings"].insert(0, slower)
