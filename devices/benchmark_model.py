"""LiteRT's C++ tool `benchmark_model`: its arguments, and what it prints in the forms of 2018 to today.

It prints statistics, not samples, in microseconds: `count=50 first=.. curr=.. min=.. max=.. avg=1.24e+06
std=..`, newer ones also `p5=.. median=.. p95=..`; older ones `min/avg/max` only. The lines may start with
`INFO: `. Times hold the whole Invoke; a GPU delegate may return before the GPU has finished.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgecomp.devices.faults import OutputFormError
from edgecomp.devices.host import Figures, Request

_NUMBER = r"([-+0-9.eE]+|nan|inf)"
_STATISTICS = re.compile(r"^(?:INFO: )?count=\d+ .*$", re.M)
_SUMMARY = re.compile(
    r"Inference timings in us: Init: (\S+?), First inference: (\S+?), Warmup \(avg\): (\S+?), "
    r"Inference \(avg\): (\S+)"
)
_OLD_SUMMARY = re.compile(
    r"Average inference timings in us: Warmup: (\S+?), Init: (\S+?), (?:Inference|no stats): (\S+)"
)
_FOOTPRINT = re.compile(
    r"(?:Peak memory footprint|Memory footprint delta from the start of the tool) \(MB\): "
    r"init=(\S+) overall=(\S+)"
)
_DELEGATE = re.compile(r"Replacing (\d+) out of (\d+) node\(s\) with delegate \(([^)]*)\)")
_TYPE, _MS = r"^(?:INFO: )?\s*([A-Za-z_0-9][\w ,:()/]*?)\s+", r"([\d.]+)\s+"
_REST = r"([\d.]+)%\s+([\d.]+)%\s+([\d.]+)\s+(\d+)\s+(.*)$"
_OP = re.compile(_TYPE + _MS * 2 + _REST, re.M)
_OP_WITH_START = re.compile(_TYPE + _MS * 3 + _REST, re.M)


def arguments(model: str, request: Request) -> list[str]:
    """Flags for a model at its path on the device."""
    flags = {
        "graph": model,
        "num_threads": request.threads,
        "num_runs": request.runs,
        "min_secs": request.seconds,
        "warmup_min_secs": min(request.warmup_seconds, 5.0),
        "report_peak_memory_footprint": "true",
        "enable_op_profiling": "true" if request.op_runs else "false",
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    named = {"gpu": "--use_gpu=true", "nnapi": "--use_nnapi=true", "none": "--use_xnnpack=false"}
    if request.accelerator in named:
        words.append(named[request.accelerator])
    elif request.accelerator not in ("auto", "cpu", "xnnpack"):
        words.append(f"--external_delegate_path={request.accelerator}")
    return words


def figures(text: str, *, before: Mapping[str, Any], after: Mapping[str, Any]) -> Figures:
    """What the tool printed as figures. Raises OutputFormError when no inference time is in it."""
    spread = statistics(text)
    init_us, first_us, average_us = summary(text)
    if spread is None and average_us is None:
        raise OutputFormError("benchmark_model", text)
    if spread is None and average_us is not None:
        spread = {"mean": average_us / 1000}
    taken = delegated(text)
    footprint = _FOOTPRINT.search(text)
    notes = [
        "benchmark_model gives statistics only: no samples, so no interval and no noise verdict",
        *[f"delegate {name} took {some} of {total} nodes" for some, total, name in taken],
    ]
    return Figures(
        runtime={"name": "benchmark_model", "version": None, "accelerator": taken[-1][2] if taken else "cpu"},
        summary=spread,
        init_ms=init_us / 1000 if init_us is not None else None,
        first_ms=first_us / 1000 if first_us is not None else None,
        load_rss_bytes=_megabytes(footprint[1]) if footprint else None,
        peak_rss_bytes=_megabytes(footprint[2]) if footprint else None,
        ops=ops(text, taken[-1][2] if taken else None),
        before=before,
        after=after,
        notes=tuple(notes),
    )


def statistics(text: str) -> dict[str, float] | None:
    """Milliseconds from the last `count=` line: the one after the warm-up's. p5 and p95 where they are."""
    lines = _STATISTICS.findall(text)
    if not lines:
        return None
    pairs = dict(re.findall(rf"(\w+)={_NUMBER}", lines[-1]))
    names = {"min": "min", "max": "max", "avg": "mean", "median": "p50", "p95": "p95"}
    return {ours: float(pairs[theirs]) / 1000 for theirs, ours in names.items() if theirs in pairs}


def summary(text: str) -> tuple[float | None, float | None, float | None]:
    """Microseconds of initialization, first inference and the average inference."""
    found = _SUMMARY.search(text)
    if found:
        return float(found[1]), float(found[2]), float(found[4])
    old = _OLD_SUMMARY.search(text)
    return (float(old[2]), None, float(old[3])) if old else (None, None, None)


def delegated(text: str) -> list[tuple[int, int, str]]:
    """Nodes taken, nodes in all, and the delegate's name, for each delegate that took any."""
    return [(int(some), int(total), name) for some, total, name in _DELEGATE.findall(text)]


def ops(text: str, delegate: str | None) -> list[dict[str, Any]] | None:
    """Rows of `Run Order` in the operator-wise profile; milliseconds are averages. None without a profile.

    Columns: node type, (start, in older forms,) first, avg ms, %, cdf%, mem KB, times called, name.
    """
    _, found, block = text.partition("Operator-wise Profiling Info for Regular Benchmark Runs")
    block = block if found else text
    _, found, block = block.partition("Run Order")
    if not found:
        return None
    block = re.split(r"=+ (?:Top by|Summary)", block)[0]
    old = "[start]" in block
    rows = []
    for row in (_OP_WITH_START if old else _OP).findall(block):
        kind, average, name = row[0].strip(), row[3 if old else 2], row[-1].strip()
        inside = delegate is not None and ("delegate" in kind.lower() or "Delegate/" in name)
        label = re.sub(r"\]?:\d+$", "", name).strip("[]")
        rows.append(
            {"name": label, "type": kind, "ms": float(average), "placed_on": delegate if inside else "cpu"}
        )
    return rows


def _megabytes(text: str) -> int | None:
    value = float(text)
    return int(value * (1 << 20)) if value > 0 else None
