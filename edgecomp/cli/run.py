"""`edgecomp run`: a whole recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgecomp.cli.common import json_option, out_option, show
from edgecomp.cli.threads import wait_without_spinning
from edgecomp.errors import GateFailed


@click.command("run")
@click.argument("recipe", metavar="RECIPE.yaml", type=click.Path(path_type=Path))
@out_option("Folder of artifacts, ledger.json and report.html (default: build/NAME of the recipe's file).",
            required=False)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on after the last finished step of an earlier run.")
@click.option(
    "--save-every",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How often a step that trains keeps its state; a kill costs no more than that.",
)
@click.option(
    "--attribute", is_flag=True, help="Afterwards, re-run with each step left out: what did it cost?"
)
@json_option
def command(
    recipe: Path,
    out: Path | None,
    resume: bool,
    save_every: float,
    attribute: bool,
    json_path: str | None,
) -> None:
    """Run a recipe: every step, the evaluation after each, exports, parity, profile, report.

    Everything is checked before the first step. The ledger is written after every step, so a run that was
    interrupted goes on with --resume, inside a training too. The exit code is 1 when a gate fails.
    """
    wait_without_spinning()
    from edgecomp import pipeline
    from edgecomp.recipe import read

    document = read(recipe)
    folder = out or Path("build") / recipe.stem
    facts = pipeline.run(document, folder, resume=resume, save_every=save_every)
    if attribute and facts["verdict"]["passed"] is not False:
        facts = pipeline.attribute(document, folder)
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun the first process tells
    show(facts, json_path, lambda shown: render(shown, folder))
    if facts["verdict"]["passed"] is False:
        raise GateFailed(facts["verdict"]["text"])


def render(facts: Mapping[str, Any], folder: Path) -> RenderableType:
    parts: list[RenderableType] = [steps_table(facts["steps"])]
    if facts["artifacts"]:
        parts.append(artifacts_table(facts["artifacts"]))
    if facts.get("attribution"):
        parts.append(attribution_table(facts["attribution"]))
    parts += [Text(warning) for warning in facts["warnings"]]
    return Group(*parts, Text(facts["verdict"]["text"]), Text(f"report: {folder / 'report.html'}"))


def steps_table(steps: list[dict[str, Any]]) -> Table:
    table = Table(
        "step", "metric", "against float", "before", "parameters", "MACs", "bytes", "seconds", "gates",
        box=None, pad_edge=False,
    )  # fmt: skip
    for row in steps:
        metric = next(iter(row["metrics"].values()), None)
        delta = next(iter(row["delta_vs_float"].values()), None)
        verdict = {True: "passed", False: "FAILED", None: ""}[row["passed"]]
        table.add_row(
            row["name"],
            number(metric, ".4f"),
            number(delta, "+.4f"),
            number(next(iter(row["delta_vs_previous"].values()), None), "+.4f"),
            number(row["params"], ","),
            number(row["macs"], ","),
            number(row["size_bytes"], ","),
            number(row["seconds"], ".1f"),
            "rolled back" if row["rolled_back"] else verdict,
        )
    return table


def artifacts_table(artifacts: list[dict[str, Any]]) -> Table:
    table = Table(
        "artifact", "bytes", "metric", "against float", "top-1 agreement", "SQNR dB", "p50 ms", "gates",
        box=None, pad_edge=False,
    )  # fmt: skip
    for entry in artifacts:
        parity = entry["parity"] or {}
        metric = parity.get("metric") or {}
        latency: Mapping[str, Any] = next((p["latency_ms"] for p in entry["profiles"] if p["latency_ms"]), {})
        gates = [*parity.get("gates", []), *entry.get("gates", [])]
        table.add_row(
            entry["path"],
            number(entry["manifest"]["size_bytes"], ","),
            number(metric.get("artifact"), ".4f"),
            number(metric.get("delta"), "+.4f"),
            number(parity.get("top1_agreement"), ".4f"),
            number(parity.get("sqnr_db"), ".1f"),
            number(latency.get("p50"), ".3f"),
            ("passed" if all(g["passed"] for g in gates) else "FAILED") if gates else "",
        )
    return table


def attribution_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("step left out", "metric without it", "what the step costs", box=None, pad_edge=False)
    for row in rows:
        told = number(row["without"], ".4f") or f"not possible: {row['reason']}"
        table.add_row(row["step"], told, number(row["cost"], "+.4f"))
    return table


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
