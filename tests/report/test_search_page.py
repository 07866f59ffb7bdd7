from __future__ import annotations

from pathlib import Path
from typing import Any

from edgecomp.report import search_page, tables, view

RESULT: dict[str, Any] = {
    "objectives": ["metric", "size_bytes", "latency_ms"],
    "trials": [
        {
            "number": n,
            "params": {"steps.0.macs": 0.1 * n, "steps.0.criterion": "<l2>"},
            "values": {"metric": 0.9 + n / 100, "size_bytes": 1000.0 * n, "latency_ms": 3.0 - n},
            "reason": None,
        }
        for n in (1, 2, 3)
    ]
    + [{"number": 4, "params": {}, "values": None, "reason": "no channel can be removed"}],
    "pareto": [1, 3],
}


def test_the_page_draws_the_front_and_lists_every_trial(tmp_path: Path) -> None:
    text = search_page.write(RESULT, "a & b", tmp_path).read_text()
    assert "<title>a &amp; b: edgecomp search</title>" in text
    assert "4 trials, 2 on the Pareto front" in text and "no channel can be removed" in text
    assert text.count("<svg") == 2 and "metric against size (kB)" in text
    assert "steps.0.macs = 0.3" in text and "&lt;l2&gt;" in text and "<script" not in text


def test_the_front_is_coloured_and_numbered_in_kilobytes() -> None:
    front, other = {1, 3}, RESULT["trials"][1]
    point = search_page._point(other, "metric", "size_bytes", front)
    assert (point.label, point.x, point.series) == ("", 2.0, 5)
    assert search_page._point(RESULT["trials"][2], "metric", "size_bytes", front).label == "3"


def test_one_objective_or_failed_trials_make_no_picture() -> None:
    assert search_page.charts({**RESULT, "objectives": ["metric"]}) == []
    assert search_page.charts({**RESULT, "trials": RESULT["trials"][3:], "pareto": []}) == []


def test_what_each_step_costs_is_in_the_report() -> None:
    ledger = {
        "steps": [{"name": "float", "metrics": {"accuracy": 0.93}}],
        "attribution": [
            {"step": "prune", "metric": 0.9, "without": 0.92, "cost": 0.02, "reason": None},
            {"step": "quantize", "metric": 0.9, "without": None, "cost": None, "reason": "needs a plan"},
        ],
    }
    table = tables.attribution(ledger)
    assert [c.text for c in table.rows[0]] == ["prune", "92.00 %", "+2.00 points"]
    assert table.rows[1][1].text == "not measured" and table.rows[1][1].note == "needs a plan"
    assert view.view(ledger).attribution == table
