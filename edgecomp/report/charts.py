"""Which pictures the ledger can fill: accuracy against latency, size by step, SQNR by layer, latencies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from edgecomp.report import figures, plots, tables
from edgecomp.report.figures import at

# More layers than this make a picture that nobody reads; the ledger has them all.
MOST_LAYERS = 40
_FORMATS = {"tflite": 0, "onnx": 1, "coreml": 2, "tensorrt": 3}


def _colour(target: str) -> int:
    """One colour for each format, the same in every picture."""
    return _FORMATS.get(target.split("-")[0], 4)


def trade(artifacts: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Task metric against median latency, one dot for each artifact and device; None without two figures."""
    names = [at(a, "parity", "metric", "name") for a in artifacts]
    name = next((n for n in names if n), None)
    several = len({at(p, "device", "name") for a in artifacts for p in a.get("profiles") or []}) > 1
    points = [
        point
        for artifact in artifacts
        for profile in artifact.get("profiles") or []
        if (point := _trade_point(artifact, profile, several)) is not None
    ]
    if not points or name is None:
        return None
    scale = 100.0 if figures.is_share(name) else 1.0
    level = next((v for a in artifacts if (v := at(a, "parity", "metric", "reference")) is not None), None)
    return plots.scatter(
        points,
        x_title="latency p50 (ms), lower is better",
        y_title=f"{name} (%)" if figures.is_share(name) else name,
        title=f"{name} against latency",
        reference=None if level is None else ("float model", level * scale),
    )


def not_in_trade(artifacts: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the artifacts that have no dot, since a figure was not measured."""
    return tuple(
        tables.name_of(a)
        for a in artifacts
        if not any(_trade_point(a, profile, False) for profile in a.get("profiles") or [])
    )


def _trade_point(
    artifact: Mapping[str, Any], profile: Mapping[str, Any], several: bool
) -> plots.Point | None:
    metric = at(artifact, "parity", "metric")
    value, median = at(metric, "artifact"), at(profile, "latency_ms", "p50")
    if value is None or median is None:
        return None
    name = str(at(metric, "name"))
    scale = 100.0 if figures.is_share(name) else 1.0
    target, device = tables.name_of(artifact), at(profile, "device", "name")
    delta, reference = at(metric, "ci95"), at(metric, "reference")
    ends = None
    if delta and reference is not None and None not in delta:
        ends = ((reference + delta[0]) * scale, (reference + delta[1]) * scale)
    spread = at(profile, "latency_ms", "ci95")
    return plots.Point(
        label=f"{target} on {device}" if several else target,
        x=median,
        y=value * scale,
        series=_colour(target),
        x_ends=(spread[0], spread[1]) if spread and None not in spread else None,
        y_ends=ends,
        note=f"{target} on {device}: {figures.metric(name, value)}, {figures.milliseconds(median)}",
    )


def shrinking(ledger: Mapping[str, Any]) -> Markup | None:
    """Bytes after each step and of each artifact."""
    rows = [
        plots.Bar(
            str(step.get("name")), step["size_bytes"] / 1000, figures.size(step["size_bytes"]), series=5
        )
        for step in ledger.get("steps") or []
        if step.get("size_bytes")
    ]
    for artifact in ledger.get("artifacts") or []:
        if bytes_ := tables.size_of(artifact):
            name = tables.name_of(artifact)
            rows.append(plots.Bar(name, bytes_ / 1000, figures.size(bytes_), series=_colour(name)))
    if len(rows) < 2:
        return None
    return plots.bars(rows, title="size after each step and of each artifact", unit="kB", row_height=24)


def layers(found: Sequence[Mapping[str, Any]]) -> tuple[Markup | None, str]:
    """SQNR of each layer against the float model, in the order of the graph, and a note for below it."""
    rows = [r for r in found if _finite(r.get("sqnr_db"))]
    if not rows:
        return None, ""
    hidden = len(rows) - MOST_LAYERS
    note = ""
    if hidden > 0:
        worst = sorted(rows, key=lambda r: r["sqnr_db"])[:MOST_LAYERS]
        rows = [r for r in rows if any(r is w for w in worst)]
        note = f"The {MOST_LAYERS} lowest of {MOST_LAYERS + hidden} layers; ledger.json has them all."
    lowest = sorted(r["sqnr_db"] for r in rows)[min(2, len(rows) - 1)]
    kinds = sorted({str(r.get("kind") or "") for r in rows})
    chart = plots.bars(
        [
            plots.Bar(
                str(r.get("module") or r.get("name")),
                r["sqnr_db"],
                figures.decibel(r["sqnr_db"]),
                series=kinds.index(str(r.get("kind") or "")) * 5 % 6,
                marked=len(rows) > 3 and r["sqnr_db"] <= lowest,
            )
            for r in rows
        ],
        title="SQNR by layer",
        unit="dB",
    )
    return chart, note


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def latencies(profile: Mapping[str, Any]) -> Markup | None:
    """How often each latency was seen; None with fewer than ten runs."""
    spread = profile.get("latency_ms") or {}
    samples = spread.get("samples") or []
    if len(samples) < 10:
        return None
    marks = [
        (f"{key} {figures.milliseconds(spread[key])}", spread[key])
        for key in ("p50", "p99")
        if spread.get(key)
    ]
    return plots.strip(samples, marks, title="latency of each run")
