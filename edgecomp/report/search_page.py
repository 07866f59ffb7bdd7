"""Writes `search.html`: the trials of a search, and which of them no other beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from edgecomp import files
from edgecomp.report import figures, plots, templates
from edgecomp.report.tables import Cell, Table, cell

_TITLES = {
    "metric": "metric",
    "size_bytes": "size (kB)",
    "latency_ms": "latency p50 (ms)",
    "macs": "multiply-accumulates (millions)",
}
_SCALES = {"size_bytes": 1e-3, "macs": 1e-6}
_ON_FRONT, _OTHERS = 0, 5


def write(result: Mapping[str, Any], title: str, folder: Path) -> Path:
    """Write `search.html` into `folder`, atomically; `result` as `edgecomp search --json` gives it."""
    final = folder / "search.html"
    with files.atomic(final) as temporary:
        temporary.write_text(html(result, title), encoding="utf-8")
    return final


def html(result: Mapping[str, Any], title: str) -> str:
    """The page as text; everything that comes from the study is escaped."""
    trials, front = result["trials"], set(result["pareto"])
    template = templates.environment().get_template("search.html.j2")
    return template.render(
        title=title,
        css=Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8")),
        count=len(trials),
        front=len(front),
        charts=charts(result),
        best=table(result["objectives"], [t for t in trials if t["number"] in front], front),
        trials=table(result["objectives"], trials, front),
    )


def charts(result: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """The first objective against each of the others; none where fewer than two trials have both figures."""
    first, *others = result["objectives"]
    found = []
    for other in others:
        points = [_point(t, first, other, set(result["pareto"])) for t in result["trials"] if t["values"]]
        if len(points) > 1:
            heading = f"{_TITLES[first]} against {_TITLES[other]}"
            points.sort(key=lambda p: p.series != _ON_FRONT)
            chart = plots.scatter(points, x_title=_TITLES[other], y_title=_TITLES[first], title=heading)
            found.append((heading, chart))
    return found


def _point(trial: Mapping[str, Any], first: str, other: str, front: set[int]) -> plots.Point:
    on_front, values = trial["number"] in front, trial["values"]
    return plots.Point(
        label=str(trial["number"]) if on_front else "",
        x=values[other] * _SCALES.get(other, 1.0),
        y=values[first] * _SCALES.get(first, 1.0),
        series=_ON_FRONT if on_front else _OTHERS,
        note=f"trial {trial['number']}: {_settings(trial['params'])}",
    )


def table(objectives: Sequence[str], trials: Sequence[Mapping[str, Any]], front: set[int]) -> Table:
    """One line for each trial: its objectives, its settings, whether it is on the front or why it failed."""
    rows = []
    for trial in trials:
        values = trial["values"] or {}
        told = Cell("Pareto front", "good") if trial["number"] in front else Cell(trial["reason"] or "")
        rows.append(
            (
                Cell(str(trial["number"])),
                *(cell(_figure(o, values.get(o))) for o in objectives),
                Cell(_settings(trial["params"])),
                told,
            )
        )
    return Table(("trial", *(f"{_TITLES[o]}#" for o in objectives), "settings", ""), tuple(rows))


def _figure(objective: str, value: float | None) -> str:
    return figures.MISSING if value is None else f"{value * _SCALES.get(objective, 1.0):,.5g}"


def _settings(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} = {v:.4g}" if isinstance(v, float) else f"{k} = {v}" for k, v in params.items())
