"""A candidate measured before its chain is finished: exported for trial, and run on a device."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp import pipeline_export as exporting
from edgecomp import registry
from edgecomp.compress.ptq import Quantize
from edgecomp.parity.gates import Gate
from edgecomp.recipe import ProfileEntry
from edgecomp.spec import Candidate, Data

_FASTEST = 0.2
_PLAIN = ("energy_mj", "first_ms", "init_ms", "load_rss_bytes", "peak_rss_bytes", "throughput_per_s")


def write(candidate: Candidate, data: Data, target: str, folder: Path) -> Path:
    """The candidate's file of that target. A float candidate gets rough scales where the target needs them:
    good for measuring time and bytes, for nothing else."""
    exporter = exporting.make_exporter(target, {})
    if candidate.quantization is None and exporting.wanted(target, exporter, candidate).quantized:
        bits = exporting.bits_for(target)
        rough = Quantize(observer="minmax", samples=16, rounding="nearest", activation_bits=bits)
        candidate = rough(candidate, data)
    path = exporting.path_for(folder, target, exporter)
    exporter.export(candidate, data, path)
    return path


def profiles(
    candidate: Candidate, data: Data, target: str, devices: Sequence[Any], entry: ProfileEntry
) -> list[dict[str, Any]]:
    """Profiles of the candidate as it would run on each device."""
    with tempfile.TemporaryDirectory(prefix="edgecomp-trial-") as folder:
        return exporting.profiles(write(candidate, data, target, Path(folder)), devices, entry)


def ratio(device: Any, first: Path, second: Path, entry: ProfileEntry) -> float:
    """How many times the first file's latency the second one takes, both in turns in one process.

    Of the fastest fifth of the runs of each: other work on the machine only ever adds time, and a median
    jumps where half of the runs are disturbed.
    """
    how = registry.load("profiling", "settings")(
        threads=entry.threads, runs=entry.runs, seconds=entry.seconds, warmup_seconds=entry.warmup_seconds
    )
    found = registry.load("profiling", "compare")(device, first, second, how)
    before, after = (np.quantile(found[side]["latency_ms"]["samples"], _FASTEST) for side in ("a", "b"))
    return float(after / before)


def judge(gates: Sequence[Gate], profiles: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Gates on figures of profiles; one without a device is judged on the first. Unmeasured is not passed."""
    found = []
    for gate in gates:
        on = [p for p in profiles if gate.device in (None, p["device"]["name"])]
        figures = _figures(on[0]) if on else {gate.name: None}
        result = gate.check(figures)
        if result["value"] is None:
            where = gate.device or "the device"
            result["reason"] = f"{gate.name} was not measured on {where}; the ledger's warnings say why"
        found.append(result)
    return found


def _figures(profile: Mapping[str, Any]) -> dict[str, Any]:
    """Flat figures: `latency_p50` in milliseconds and the like."""
    latency = {f"latency_{k}": v for k, v in (profile["latency_ms"] or {}).items()}
    names = {f"latency_{n}": None for n in ("min", "mean", "p50", "p90", "p95", "p99", "max")}
    return {**names, **latency, **{k: profile.get(k) for k in _PLAIN}}
