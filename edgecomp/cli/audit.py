"""`edgecomp audit`: is this calibration data fit for use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from edgecomp.cli.common import data_option, json_option, show
from edgecomp.errors import GateFailed
from edgecomp.spec import Data


def render(shown: Mapping[str, Any]) -> RenderableType:
    shape = " x ".join(map(str, shown["shape"])) or "unknown"
    lines = [Text(f"{shown['data']}: {shown['samples']} samples of {shape}, {shown['distinct']} distinct")]
    if shown["low"] is not None:
        lines.append(Text(f"values {shown['low']:.4g} to {shown['high']:.4g}, mean {shown['mean']:.4g}"))
    if shown["classes"]:
        counts = shown["classes"].values()
        lines.append(Text(f"{len(counts)} classes, {min(counts)} to {max(counts)} samples each"))
    if shown["ranges"] is not None:
        lines += range_lines(shown["ranges"])
    for finding in shown["findings"]:
        style = "bold red" if finding["level"] == "error" else "yellow"
        lines.append(Text(f"{finding['level']}: {finding['check']}: {finding['message']}", style=style))
    lines.append(Text("fit for calibration" if shown["fit"] else "NOT fit for calibration"))
    return Group(*lines)


def range_lines(ranges: Mapping[str, Any]) -> list[Text]:
    """How far activation ranges move between draws, and how many samples are enough."""
    lines = [
        Text(
            f"ranges from {draw['samples']} samples fall short by {draw['deviation']:.1%} "
            f"(worst {draw['worst_module']}: {draw['worst_deviation']:.1%})"
        )
        for draw in ranges["draws"]
    ]
    enough = ranges["enough"]
    text = f"{enough} samples are enough" if enough else f"{ranges['samples']} samples are not enough"
    return [*lines, Text(f"{text} for ranges to settle within 5 %")]


@click.command("audit")
@click.argument("source", metavar="SRC")
@data_option("--data", "Evaluation data whose ranges and classes SRC should resemble.")
@click.option("--model", metavar="MODEL", help="Also measure how far this model's activation ranges move.")
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Read about N samples only.")
@json_option
def command(
    source: str, data: str | None, model: str | None, limit: int | None, json_path: str | None
) -> None:
    """Look for what makes calibration data unfit.

    SRC is a folder, an .npz, .npy or CSV file, or path/to/file.py:callable. Looked for: too few samples,
    copies, missing classes, NaN, constant samples, values that the preprocessing cannot give, data that
    looks random, and ranges that differ from the evaluation data's. The exit code is 1 when SRC is unfit.
    """
    from edgecomp.audit import audit
    from edgecomp.loading import open_data

    evaluation = open_data(data) if data else None
    opened = open_data(source)
    report = {"data": source, **audit(opened, evaluation, limit=limit), "ranges": None}
    if model is not None and report["fit"]:
        from edgecomp.audit_ranges import SAMPLES, stability
        from edgecomp.pipeline_single import Model

        candidate, _ = Model(model).load(Data(calibration=opened))
        module = candidate.module
        report["ranges"] = stability(module, candidate.inputs, opened, samples=limit or SAMPLES)
    show(report, json_path, render)
    if not report["fit"]:
        first = next(f for f in report["findings"] if f["level"] == "error")
        raise GateFailed(f"{source} is not fit for calibration: {first['message']}")
