"""What `edgecomp inspect` prints of a forecast, alone or beside what the runtime made of the artifact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_SHOWN = 40


def render_forecast(facts: Mapping[str, Any]) -> RenderableType:
    """How many operations run in integers, in float, or not at all; and each that is no integer one."""
    rows = facts["rows"]
    counted = Counter(row["runs"] for row in rows)
    head = ", ".join(f"{count} {runs}" for runs, count in counted.most_common())
    others = [r for r in rows if r["runs"] in ("float", "none") or (r["runs"] == "integer" and r["why"])]
    return Group(Text(f"forecast for {facts['target']}: {head}"), *_listed(others))


def _listed(rows: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """Operations that share type, reason and source line stand in one row."""
    counted = Counter((r["runs"], r["type"], r["why"], r["line"] or "") for r in rows)
    table = Table("ops", "", "type", "why", "source line", box=None, pad_edge=False)
    for (runs, kind, why, line), count in counted.most_common(_SHOWN):
        table.add_row(str(count), {"none": "not at all"}.get(runs, runs), kind, why, line)
    more = len(counted) - _SHOWN
    return [table, *([Text(f"and {more} kinds more (--json has all)")] if more > 0 else [])]


def render_against(facts: Mapping[str, Any]) -> list[RenderableType]:
    """Forecast against actual: the scores, and every operation that runs otherwise than told."""
    parts: list[RenderableType] = [Text(), render_forecast(facts)]
    for key, what in (("integer", "runs in integers"), ("delegated", "runs in the delegate")):
        score = facts[key]
        if score:
            shares = f"precision {_share(score['precision'])}, recall {_share(score['recall'])}"
            counts = f"told {score['told']}, is {score['was']} of {facts['operations']} operations"
            parts.append(Text(f"{what}: {counts}, {shares}"))
    wrong = [r for r in facts["rows"] if r["actual"] in ("integer", "float") and r["runs"] != r["actual"]]
    parts += [
        Text(f"otherwise than told: {r['type']} {r['name']} is {r['actual']}, not {r['runs']}")
        for r in wrong[:_SHOWN]
    ]
    return parts


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
