"""`edgecomp distill`: a student learns from a teacher."""

from __future__ import annotations

from typing import Any

import click

from edgecomp.cli import step


@click.command("distill")
@step.options
@click.option(
    "--kind", type=click.Choice(["outputs", "text"]), default="outputs", show_default=True,
    help="Outputs, also of layers; or the next-token distributions of a causal language model.",
)  # fmt: skip
@click.option("--teacher", metavar="MODEL", help="The teacher (default: the checkpoint's float original).")
@click.option("--epochs", type=int, help="Passes over the training data.")
def command(kind: str, teacher: str | None, epochs: int | None, **facts: Any) -> None:
    """Train MODEL (or a checkpoint of edgecomp) as a student, and write a checkpoint.

    Needs --train. Other settings of the step: --set temperature=4 --set alpha=0.7 --set learning_rate=0.001;
    of an embedding's student --set loss=cosine --set alpha=1; with --kind text --set divergence=reverse.
    """
    step.run("distill" if kind == "outputs" else "distill-text", facts, {"epochs": epochs}, teacher)
