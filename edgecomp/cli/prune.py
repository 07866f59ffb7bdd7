"""`edgecomp prune`: remove channels, or set the smallest weights to zero."""

from __future__ import annotations

from typing import Any

import click

from edgecomp.cli import step


@click.command("prune")
@step.options
@click.option(
    "--kind", type=click.Choice(["channels", "magnitude"]), default="channels", show_default=True,
    help="Remove whole channels, or zero single weights.",
)  # fmt: skip
@click.option("--sparsity", type=float, help="Fraction that goes.")
@click.option("--macs", type=float, help="Multiply-accumulates that may remain, as a fraction or a number.")
def command(kind: str, sparsity: float | None, macs: float | None, **facts: Any) -> None:
    """Prune MODEL (or a checkpoint of edgecomp) and write a checkpoint.

    Channels are really removed, coupled ones together; what was not pruned is listed with the reason.
    Other settings of the step: --set criterion=taylor --set round_to=8.
    """
    name = "prune" if kind == "channels" else "prune-magnitude"
    step.run(name, facts, {"sparsity": sparsity, "macs": macs})
