"""The ledger's lists as tables of text, for HTML and Markdown alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from edgecomp.report import figures
from edgecomp.report.figures import MISSING, at

_EMPTY: tuple[Any, ...] = (None, "", [], (), {})
Tone = Literal["", "good", "bad", "faint"]


@dataclass(frozen=True)
class Cell:
    """`text` of a cell, its tone, and a smaller line below it."""

    text: str
    tone: Tone = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """`columns`: titles; a title that ends in `#` holds figures and is set to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def titles(self) -> list[tuple[str, bool]]:
        return [(c.rstrip("#"), c.endswith("#")) for c in self.columns]


def cell(text: str, note: str = "") -> Cell:
    """A cell whose tone is faint when nothing was measured."""
    return Cell(text, "faint" if text == MISSING else "", note)


def passed(value: bool | None) -> Cell:
    if value is None:
        return Cell("no gate", "faint")
    return Cell("\u2713 passed", "good") if value else Cell("\u2717 failed", "bad")


def main_metric(steps: Sequence[Mapping[str, Any]]) -> str | None:
    """The first metric that the steps report."""
    return next((name for step in steps for name in (at(step, "metrics") or {})), None)


def steps(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracy, size, MACs of the model after every step; the first row is the float model."""
    name = main_metric(rows)
    first = at(rows[0], "size_bytes") if rows else None
    columns = (
        "step",
        f"{name or 'metric'}#",
        *("against float#", "against step before#", "size#", "parameters#"),
        *("MACs#", "time#", "peak memory#", "gates"),
    )
    return Table(columns, tuple(_step(row, name, first) for row in rows))


def _step(row: Mapping[str, Any], name: str | None, first: float | None) -> tuple[Cell, ...]:
    ratio = figures.times(first, row.get("size_bytes"))
    total, left = row.get("params"), row.get("nonzero_params")
    sparse = f"{figures.count(left)} not zero" if left is not None and left != total else ""
    smaller = [] if ratio in (MISSING, "1.00\u00d7") else [f"{ratio} smaller"]
    if row.get("compressed_bytes") is not None:
        smaller.append(f"{figures.size(row['compressed_bytes'])} compressed")
    return (
        Cell(str(row.get("name", "?")), note=_settings(row)),
        cell(figures.metric(name or "", at(row, "metrics", name or ""))),
        cell(figures.change(name or "", _of_metric(row.get("delta_vs_float"), name))),
        cell(figures.change(name or "", _of_metric(row.get("delta_vs_previous"), name))),
        cell(
            figures.size(row.get("size_bytes")),
            ", ".join(smaller),
        ),
        cell(figures.count(total), sparse),
        cell(figures.count(row.get("macs"))),
        cell(figures.seconds(row.get("seconds"))),
        cell(figures.size(row.get("peak_rss_bytes"))),
        Cell("rolled back", "bad") if row.get("rolled_back") else passed(row.get("passed")),
    )


def _of_metric(value: Any, name: str | None) -> float | None:
    """A delta is a number, or a number for each metric."""
    return at(value, name or "") if isinstance(value, Mapping) else value


def _settings(row: Mapping[str, Any]) -> str:
    kind, settings = row.get("kind"), row.get("settings") or {}
    shown = [f"{key} {_short(value)}" for key, value in settings.items() if value not in _EMPTY]
    words = [str(kind)] if kind and kind != row.get("name") else []
    return ", ".join(words + shown[:6]) + (", \u2026" if len(shown) > 6 else "")


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 40 else text[:39] + "\u2026"


def name_of(artifact: Mapping[str, Any]) -> str:
    return str(at(artifact, "manifest", "target") or at(artifact, "parity", "target") or "artifact")


def file_of(artifact: Mapping[str, Any]) -> str:
    path = artifact.get("path") or at(artifact, "manifest", "path") or at(artifact, "parity", "path") or ""
    return PurePath(str(path)).name


def size_of(artifact: Mapping[str, Any]) -> float | None:
    found: float | None = at(artifact, "manifest", "size_bytes") or at(artifact, "parity", "size_bytes")
    return found


def artifacts(rows: Sequence[Mapping[str, Any]], float_bytes: float | None) -> Table:
    """One line for each file: size, the task metric, agreement with the float model, latency of the first
    device, gates."""
    columns = (
        *("target", "size#", "metric#", "against float#", "top-1 agreement#", "SQNR#", "max error#"),
        *("latency p50#", "peak memory#", "gates"),
    )
    return Table(columns, tuple(_artifact(row, float_bytes) for row in rows))


def _artifact(row: Mapping[str, Any], float_bytes: float | None) -> tuple[Cell, ...]:
    parity: Mapping[str, Any] = row.get("parity") or {}
    profile: Mapping[str, Any] = next(iter(row.get("profiles") or ()), {})
    name = str(at(parity, "metric", "name") or "")
    ratio = figures.times(float_bytes, size_of(row))
    ends = figures.interval(name, at(parity, "metric", "ci95"))
    p90 = at(profile, "latency_ms", "p90")
    gates = [*(parity.get("gates") or []), *(row.get("gates") or [])]
    held = sum(bool(g.get("passed")) for g in gates)
    return (
        Cell(name_of(row), note=file_of(row)),
        cell(figures.size(size_of(row)), "" if ratio == MISSING else f"{ratio} smaller"),
        cell(figures.metric(name, at(parity, "metric", "artifact")), name),
        cell(figures.change(name, at(parity, "metric", "delta")), ends),
        cell(figures.metric("agreement", parity.get("top1_agreement"))),
        cell(figures.decibel(parity.get("sqnr_db"))),
        cell(figures.number(parity.get("max_abs_error"))),
        cell(figures.milliseconds(at(profile, "latency_ms", "p50")), _p90(p90)),
        cell(figures.size(profile.get("peak_rss_bytes"))),
        Cell(f"{held} of {len(gates)}", "good" if held == len(gates) else "bad") if gates else passed(None),
    )


def _p90(value: float | None) -> str:
    return "" if value is None else f"p90 {figures.milliseconds(value)}"


def gates(ledger: Mapping[str, Any]) -> Table:
    """Every gate that was looked at, of steps and of artifacts."""
    found = [
        (name_of(artifact), gate)
        for artifact in ledger.get("artifacts") or []
        for gate in [*(at(artifact, "parity", "gates") or []), *(artifact.get("gates") or [])]
    ]
    found += [(str(s.get("name")), gate) for s in ledger.get("steps") or [] for gate in s.get("gates") or []]
    rows = tuple(
        (
            Cell(str(where)),
            Cell(str(gate.get("expr", "")), note=str(gate.get("reason") or "")),
            cell(figures.number(gate.get("value"), 4)),
            passed(gate.get("passed")),
        )
        for where, gate in found
    )
    return Table(("of", "gate", "value#", ""), rows)


def attribution(ledger: Mapping[str, Any]) -> Table:
    """What the metric would be without each step, and so what the step takes from it."""
    name = main_metric(ledger.get("steps") or []) or "metric"
    rows = []
    for row in ledger.get("attribution") or []:
        cost = row.get("cost")
        rows.append(
            (
                Cell(str(row.get("step"))),
                cell(figures.metric(name, row.get("without")), str(row.get("reason") or "")),
                cell(figures.change(name, cost)),
            )
        )
    return Table(("step left out", f"{name} without it#", "what the step costs#"), tuple(rows))


def left_out(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Operations that were skipped or stayed float, with the reason."""
    found = [(name_of(row), problem) for row in rows for problem in at(row, "manifest", "skipped") or []]
    return Table(
        ("artifact", "operation", "module", "reason"),
        tuple(
            (Cell(name), *(Cell(str(p.get(k, ""))) for k in ("op", "module", "reason"))) for name, p in found
        ),
    )


def latency(profile: Mapping[str, Any]) -> Table:
    """The figures of one profile."""
    spread = profile.get("latency_ms") or {}
    pairs = [
        ("first", figures.milliseconds(profile.get("first_ms"))),
        *((key, figures.milliseconds(spread.get(key))) for key in ("p50", "p90", "p95", "p99")),
        ("runs", str(len(spread["samples"])) if spread.get("samples") else MISSING),
        ("opening", figures.milliseconds(profile.get("init_ms"))),
        ("peak memory", figures.size(profile.get("peak_rss_bytes"))),
        ("energy", f"{figures.number(profile.get('energy_mj'))} mJ" if profile.get("energy_mj") else MISSING),
    ]
    if profile.get("instructions") is not None:
        pairs.append(("instructions", figures.count(profile["instructions"])))
    return Table(tuple(f"{name}#" for name, _ in pairs), (tuple(cell(text) for _, text in pairs),))


def slowest(profile: Mapping[str, Any], limit: int = 10) -> Table:
    """The operations that take longest; empty when the runtime gives no times by op."""
    timed = [op for op in profile.get("ops") or [] if op.get("ms") is not None]
    total = sum(op["ms"] for op in timed) or 1.0
    rows = sorted(timed, key=lambda op: -op["ms"])[:limit]
    return Table(
        ("operation", "type", "placed on", "time#", "share#"),
        tuple(
            (
                Cell(str(op.get("name", ""))),
                Cell(str(op.get("type", ""))),
                Cell(str(op.get("placed_on", ""))),
                cell(figures.milliseconds(op["ms"])),
                Cell(f"{100 * op['ms'] / total:.0f} %"),
            )
            for op in rows
        ),
    )
