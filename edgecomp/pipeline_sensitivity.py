"""Sensitivity of a quantized checkpoint, layer by layer, weights and activations apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgecomp import checkpoint, decide_bits
from edgecomp.errors import InputError
from edgecomp.pipeline_single import Sources

SAMPLES = 8


def of_checkpoint(path: Path, sources: Sources) -> list[dict[str, Any]]:
    """Rows `kind`, `name`, `module`, `bits`, `sqnr_db`, `share`, `elements`, most harmful first.

    Measured on the first 8 calibration samples (else evaluation samples). Raises InputError without data.
    """
    candidate, _ = checkpoint.load(path)
    data = sources.open()
    source = data.calibration or data.evaluation or data.train
    if source is None:
        raise InputError("sensitivity needs data to run the model on; give --calib SRC")
    return decide_bits.table(decide_bits.measured(candidate, source, SAMPLES))
