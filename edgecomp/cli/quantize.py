"""`edgecomp quantize`: choose scales once, for every target."""

from __future__ import annotations

from typing import Any

import click

from edgecomp.cli import step


@click.command("quantize")
@step.options
@click.option("--samples", type=int, help="Calibration samples that are used.")
@click.option(
    "--groups", is_flag=True, help="Weights of 4 bits in groups and float activations (quantize-weights)."
)
def command(samples: int | None, groups: bool, **facts: Any) -> None:
    """Quantize MODEL (or a checkpoint of edgecomp) with calibration data, and write a checkpoint.

    Needs --calib. `edgecomp export CHECKPOINT` then lowers the same scales to every integer target.
    Other settings of the step: --set observer=mse --set activation_bits=16.

    With --groups only weights become integers, for onnx-int4, tflite-int4 and coreml-int4; settings are then
    such as --set method=hqq --set group_size=128 --set symmetric=false --set scaling=awq.
    """
    step.run("quantize-weights" if groups else "quantize", facts, {"samples": samples})
