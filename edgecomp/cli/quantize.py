"""`edgecomp quantize`: choose scales once, for every target."""

from __future__ import annotations

from typing import Any

import click

from edgecomp.cli import step


@click.command("quantize")
@step.options
@click.option("--samples", type=int, help="Calibration samples that are used.")
def command(samples: int | None, **facts: Any) -> None:
    """Quantize MODEL (or a checkpoint of edgecomp) with calibration data, and write a checkpoint.

    Needs --calib. `edgecomp export CHECKPOINT` then lowers the same scales to every integer target.
    Other settings of the step: --set observer=mse --set activation_bits=16.
    """
    step.run("quantize", facts, {"samples": samples})
