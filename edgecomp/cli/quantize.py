"""`edgecomp quantize`: choose scales once, for every target; within a budget where one is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgecomp.cli import step

_ROWS = 20
_BAR = 20


@click.command("quantize")
@step.options
@click.option("--samples", type=int, help="Calibration samples that are used.")
@click.option(
    "--max-drop",
    type=float,
    metavar="POINTS",
    help="Try methods, cheap ones first, until no more is lost: points of the metric, or of top-1 agreement.",
)
@click.option(
    "--min-sqnr", type=float, metavar="DB",
    help="In place of --max-drop: until the noise at the outputs lies that far below them.",
)  # fmt: skip
@click.option(
    "--size-bytes", type=int,
    help="With --max-drop: 4-bit weights, where they cost least, until they fit. With --groups: 2 to 8 bits.",
)  # fmt: skip
@click.option(
    "--allow-float", is_flag=True,
    help="With --max-drop: operations may stay float where integers cost most (ONNX; TFLite refuses them).",
)  # fmt: skip
@click.option(
    "--groups", is_flag=True, help="Weights of 4 bits in groups and float activations (quantize-weights)."
)
@click.option("--sensitivity", is_flag=True, help="Also show what each weight and activation costs alone.")
def command(
    samples: int | None,
    max_drop: float | None,
    min_sqnr: float | None,
    size_bytes: int | None,
    allow_float: bool,
    groups: bool,
    sensitivity: bool,
    **facts: Any,
) -> None:
    """Quantize MODEL (or a checkpoint of edgecomp) with calibration data, and write a checkpoint.

    Needs --calib. `edgecomp export CHECKPOINT` then lowers the same scales to every integer target.
    Other settings of the step: --set observer=mse --set "rules={blocks.0: {activation_bits: 16}}".

    With --groups only weights become integers, for onnx-int4, tflite-int4 and coreml-int4; settings are then
    such as --set method=hqq --set group_size=128 --set symmetric=false --set scaling=awq. With
    --size-bytes each weight gets 2, 3, 4, 6 or 8 bits, by what its rounding costs the model.
    """
    if max_drop is not None and min_sqnr is not None:
        raise click.UsageError("--max-drop and --min-sqnr are two budgets; give one of them")
    budget = max_drop is not None or min_sqnr is not None
    if groups and (budget or sensitivity):
        raise click.UsageError(
            "--groups goes with no --max-drop, --min-sqnr or --sensitivity, which try activations"
        )
    if groups:
        step.run("quantize-weights", facts, {"samples": samples, "size_budget": size_bytes})
        return
    if size_bytes is not None and not budget:
        raise click.UsageError("--size-bytes goes with --max-drop: say what may be lost for it")
    if allow_float and not budget:
        raise click.UsageError("--allow-float goes with --max-drop; --set exclude=... keeps operations float")
    extra = {"samples": samples, "max_drop": max_drop, "min_sqnr_db": min_sqnr, "size_bytes": size_bytes}
    extra |= {"allow_float": True} if allow_float else {}
    name = "quantize-to-budget" if budget else "quantize"

    def then(result: dict[str, Any]) -> RenderableType:
        below: list[RenderableType] = []
        if budget:
            below.append(attempts(result["settings"]["attempts"]))
        if sensitivity:
            result["sensitivity"] = _measured(Path(result["checkpoint"]), facts)
            below.append(costs(result["sensitivity"]))
        return Group(*below)

    step.run(name, facts, extra, then=then)


def _measured(checkpoint: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    from edgecomp.pipeline_sensitivity import of_checkpoint
    from edgecomp.pipeline_single import Sources

    sources = Sources(facts["train"], facts["calib"], facts["data"], facts["preprocessing"])
    return of_checkpoint(checkpoint, sources)


def attempts(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What each method gained over what was kept before it, and what it cost."""
    table = Table(
        "method", "SQNR dB", "gain", "drop", "gained", "seconds", "bytes", "", box=None, pad_edge=False
    )
    for row in rows:
        quality = row["quality"]
        table.add_row(
            row["method"],
            format(quality["sqnr_db"], ".2f"),
            _signed(row["gain_db"]),
            format(quality["drop"], ".2f"),
            _signed(row["gain_points"]),
            format(row["seconds"], ".1f"),
            format(row["size_bytes"], ","),
            "kept" if row["kept"] else "left out",
        )
    return table


def _signed(value: float | None) -> str:
    return "" if value is None else format(value, "+.2f")


def costs(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The most harmful roundings, each alone, with its share of all noise as a bar."""
    table = Table("rounding", "name", "module", "bits", "SQNR dB", "share", "", box=None, pad_edge=False)
    largest = max((row["share"] for row in rows), default=1.0) or 1.0
    for row in rows[:_ROWS]:
        table.add_row(
            row["kind"],
            row["name"],
            row["module"],
            str(row["bits"]),
            format(row["sqnr_db"], ".1f"),
            format(row["share"], ".1%"),
            "█" * round(_BAR * row["share"] / largest),
        )
    left = len(rows) - _ROWS
    return Group(table, Text(f"and {left} more with less")) if left > 0 else table
