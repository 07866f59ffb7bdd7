"""`edgecomp init`: look at a model and write a recipe for it."""

from __future__ import annotations

from pathlib import Path

import click

from edgecomp.cli.common import data_option, model_argument
from edgecomp.cli.step import shape
from edgecomp.errors import InputError


@click.command("init")
@model_argument
@data_option("--train", "Training data: pruning and distillation become part of the recipe.")
@data_option("--calib", "Calibration data.")
@data_option("--data", "Evaluation data.", required=True)
@click.option("--weights", metavar="FILE", type=click.Path(path_type=Path), help="State dict of MODEL.")
@click.option(
    "--preprocessing", metavar="FILE", type=click.Path(path_type=Path),
    help="YAML of how pictures become arrays.",
)  # fmt: skip
@click.option(
    "--input-shape", "shapes", multiple=True, metavar="N,N,...",
    help="Shape of an input, batch 1 first, where no data tells; repeatable.",
)  # fmt: skip
@click.option(
    "--out", metavar="FILE", default="recipe.yaml", show_default=True, type=click.Path(path_type=Path),
    help="The recipe that is written.",
)  # fmt: skip
def command(
    model: str,
    train: str | None,
    calib: str | None,
    data: str,
    weights: Path | None,
    preprocessing: Path | None,
    shapes: tuple[str, ...],
    out: Path,
) -> None:
    """Look at MODEL and its data, and write a recipe with comments as a start.

    An existing file is never overwritten.
    """
    from edgecomp import files
    from edgecomp.pipeline_single import Model, Sources
    from edgecomp.recipe import read
    from edgecomp.suggest import recipe_for

    if out.exists():
        raise InputError(f"{out} exists already; choose another with --out, or remove it")
    found = Model(model, weights, tuple(shape(s) for s in shapes))
    text = recipe_for(found, Sources(train, calib or train, data, preprocessing))
    with files.atomic(out) as temporary:
        temporary.write_text(text)
        read(temporary)
    click.echo(f"wrote {out}; look at it, then: edgecomp run {out}")
