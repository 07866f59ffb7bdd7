"""`edgecomp parity`: artifacts against the float model; a gate that fails makes the exit code 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from edgecomp import files
from edgecomp.cli.common import data_option, json_option, model_argument, show
from edgecomp.cli.parity_show import render
from edgecomp.errors import GateFailed
from edgecomp.parity.junit import write


def fail_if_needed(entries: Sequence[Mapping[str, Any]]) -> None:
    """Raise GateFailed that counts what failed; the lines were printed before."""
    failed = [(e, g) for e in entries for g in e["gates"] if not g["passed"]]
    if failed:
        entry, gate = failed[0]
        raise GateFailed(
            f"{len(failed)} of {sum(len(e['gates']) for e in entries)} gates failed; the first: "
            f"{Path(entry['path']).name}: {gate['reason']}"
        )


@click.command("parity")
@model_argument
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@data_option("--data", "Evaluation data, prepared as the artifact says.", required=True)
@click.option("--weights", metavar="FILE", type=click.Path(path_type=Path), help="State dict of MODEL.")
@click.option("--gate", "exprs", metavar="EXPR", multiple=True, help="A condition; repeatable.")
@click.option("--metric", metavar="NAME", help="accuracy, rmse, miou, ...; default: what fits the data.")
@click.option("--slice", "columns", metavar="COLUMN", multiple=True, help="Metadata column; repeatable.")
@click.option("--corruption", "corruptions", metavar="NAME|all", multiple=True, help="Repeatable.")
@click.option("--fgsm", metavar="EPSILON", type=float, help="Adversarial inputs made on the float model.")
@click.option("--flips", metavar="DIR", type=click.Path(path_type=Path), help="Write inputs of flips here.")
@click.option("--ladder", is_flag=True, help="Every stage apart; names the first layer that diverges.")
@click.option(
    "--device", "devices", metavar="NAME", multiple=True,
    help="Run the artifact there too and compare the integers; a rung of --ladder; repeatable.",
)  # fmt: skip
@click.option("--inventory", type=click.Path(path_type=Path), metavar="FILE", help="The file of devices.")
@click.option("--junit", metavar="FILE", type=click.Path(path_type=Path), help="Write gates as JUnit XML.")
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Use the first N samples only.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1))
@json_option
def command(
    model: str,
    artifacts: tuple[Path, ...],
    data: str,
    weights: Path | None,
    exprs: tuple[str, ...],
    metric: str | None,
    columns: tuple[str, ...],
    corruptions: tuple[str, ...],
    fgsm: float | None,
    flips: Path | None,
    ladder: bool,
    devices: tuple[str, ...],
    inventory: Path | None,
    junit: Path | None,
    limit: int | None,
    threads: int,
    json_path: str | None,
) -> None:
    """Compare artifacts with the float model they were made from.

    ARTIFACT is a .tflite or .onnx file or an .mlpackage folder. A gate is NAME OP NUMBER, such as
    'top1_agreement >= 0.98', 'sqnr_db > 20', 'metric.delta.low >= -0.01', 'devices.equal_share == 1'. The
    exit code is 1 when a gate fails. With --device (without --ladder) the artifact runs on this machine and
    on each device: equal outputs, largest step, top-1 flips, and integer kernels that saturate.
    """
    from edgecomp import comparison

    if junit is not None:
        files.check_writable(junit.parent)
    wanted = comparison.Comparison(
        model=model, artifacts=artifacts, data=data, weights=weights, gates=exprs, metric=metric,
        slices=columns, corruptions=corruptions, fgsm=fgsm, flips=flips, ladder=ladder, devices=devices,
        inventory=inventory, limit=limit, threads=threads,
    )  # fmt: skip
    facts = comparison.run(wanted)
    if junit is not None:
        write(facts["artifacts"], junit)
    show(facts, json_path, render)
    fail_if_needed(facts["artifacts"])
