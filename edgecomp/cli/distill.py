"""`edgecomp distill`: a student learns from a teacher."""

from __future__ import annotations

from typing import Any

import click

from edgecomp.cli import step


@click.command("distill")
@step.options
@click.option("--teacher", metavar="MODEL", help="The teacher (default: the checkpoint's float original).")
@click.option("--epochs", type=int, help="Passes over the training data.")
def command(teacher: str | None, epochs: int | None, **facts: Any) -> None:
    """Train MODEL (or a checkpoint of edgecomp) as a student, and write a checkpoint.

    Needs --train. Other settings of the step: --set temperature=4 --set alpha=0.7 --set learning_rate=0.001.
    """
    step.run("distill", facts, {"epochs": epochs}, teacher)
