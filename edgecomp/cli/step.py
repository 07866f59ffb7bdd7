"""What `edgecomp prune`, `distill` and `quantize` share: a checkpoint in, a checkpoint out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgecomp.cli.common import data_option, json_option, model_argument, parse_settings, set_option, show
from edgecomp.cli.threads import wait_without_spinning

F = TypeVar("F", bound=Callable[..., Any])


def options(command: F) -> F:
    """Arguments that every step command has."""
    for add in (
        json_option,
        set_option,
        click.option(
            "--input-shape",
            "shapes",
            multiple=True,
            metavar="N,N,...",
            help="Shape of an input, batch 1 first, where no data tells; repeatable.",
        ),
        click.option(
            "--preprocessing", metavar="FILE", type=click.Path(path_type=Path),
            help="YAML of how pictures become arrays.",
        ),
        click.option("--weights", metavar="FILE", type=click.Path(path_type=Path), help="State dict."),
        click.option(
            "--out", metavar="FILE", required=True, type=click.Path(path_type=Path),
            help="The checkpoint that is written.",
        ),
        data_option("--data", "Evaluation data: the task metric before and after."),
        data_option("--calib", "Calibration data."),
        data_option("--train", "Training data."),
        model_argument,
    ):  # fmt: skip
        command = add(command)
    return command


def run(
    name: str,
    facts: Mapping[str, Any],
    extra: Mapping[str, Any],
    teacher: str | None = None,
    then: Callable[[dict[str, Any]], RenderableType] | None = None,
) -> None:
    """Run the step `name` with the options of `options`, and print what it changed.

    `extra`: settings that the command has options of its own for; None means not given. `then`: adds facts of
    its own to the result, and gives what is printed below it.
    """
    wait_without_spinning()
    from edgecomp.pipeline_single import Model, Sources, one_step

    settings = {**parse_settings(facts["settings"]), **{k: v for k, v in extra.items() if v is not None}}
    result = one_step(
        name,
        settings,
        Model(facts["model"], facts["weights"], tuple(shape(s) for s in facts["shapes"])),
        Sources(facts["train"], facts["calib"], facts["data"], facts["preprocessing"]),
        facts["out"],
        teacher,
    )
    below = then(result) if then else None
    show(result, facts["json_path"], lambda found: Group(render(found), below) if below else render(found))


def shape(text: str) -> tuple[int, ...]:
    """`1,3,224,224` -> (1, 3, 224, 224)."""
    try:
        values = tuple(int(word) for word in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise click.BadParameter(
            f"{text!r} is no shape; expected such as 1,3,224,224", param_hint="--input-shape"
        )
    return values


def render(result: Mapping[str, Any]) -> RenderableType:
    table = Table("", "before", "after", box=None, pad_edge=False)
    before, after = result["before"], result["after"]
    for name, value in after["metrics"].items():
        table.add_row(name, format(before["metrics"][name], ".4f"), format(value, ".4f"))
    for key in ("params", "nonzero_params", "macs", "size_bytes", "compressed_bytes"):
        cells = ["not counted" if each[key] is None else format(each[key], ",") for each in (before, after)]
        if key != "compressed_bytes" or after[key] is not None:
            table.add_row(key, *cells)
    notes = [Text(note) for note in result["notes"]]
    return Group(table, *notes, Text(f"checkpoint: {result['checkpoint']}"))
