"""`edgecomp prune`: remove channels or whole layers, or set single weights to zero."""

from __future__ import annotations

from typing import Any

import click

from edgecomp.cli import step

_STEPS = {
    "channels": "prune",
    "iterative": "prune-iterative",
    "budget": "prune-to-budget",
    "layers": "drop-layers",
    "magnitude": "prune-magnitude",
    "movement": "prune-movement",
}


@click.command("prune")
@step.options
@click.option(
    "--kind", type=click.Choice(list(_STEPS)), default="channels", show_default=True,
    help="Channels: at once, in rounds with training, or until a file fits a budget; whole layers; single "
    "weights: the smallest, or those that training moves to zero.",
)  # fmt: skip
@click.option("--sparsity", type=float, help="Fraction that goes.")
@click.option("--macs", type=float, help="Multiply-accumulates that may remain, as a fraction or a number.")
@click.option("--params", type=float, help="Parameters that may remain, as a fraction or a number.")
def command(
    kind: str, sparsity: float | None, macs: float | None, params: float | None, **facts: Any
) -> None:
    """Prune MODEL (or a checkpoint of edgecomp) and write a checkpoint.

    Channels are really removed, coupled ones together; what was not pruned is listed with the reason.
    Other settings of the step: --set criterion=taylor --set round_to=8. More kinds: --kind layers --set
    count=2; --kind budget --set latency_ms=5 --set target=tflite-int8; --kind magnitude --set pattern=2:4.
    """
    step.run(_STEPS[kind], facts, {"sparsity": sparsity, "macs": macs, "params": params})
