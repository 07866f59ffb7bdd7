"""PReLU in 8 bits: each result rounded once, in every set of kernels; which operations it is made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tflite_support import direct, expected, export, op_types, quantized, run
from torch import nn

from edgecomp.graph import fake_quant

PICTURE = torch.randn(1, 4, 40, 40, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(
    ("slopes", "kinds"),
    [
        ([0.1, -0.3, 0.9, 0.25], ["MUL", "MUL", "MAXIMUM"]),
        ([1.2, 2.0, 1.5, 3.0], ["MUL", "MUL", "MINIMUM"]),
        ([0.25], ["MUL", "MUL", "MAXIMUM"]),
        ([0.1, 2.0, -1.5, 1.0], ["MAXIMUM", "MINIMUM", "MUL", "MUL", "ADD"]),
    ],
    ids=["below 1", "above 1", "one slope", "on both sides"],
)
def test_products_are_rounded_once(slopes: list[float], kinds: list[str], tmp_path: Path) -> None:
    module = nn.PReLU(len(slopes))
    module.weight.data = torch.tensor(slopes)
    made = quantized(module.eval(), PICTURE)
    (wanted,) = expected(fake_quant.fake_quantize(made.module, made.quantization), (PICTURE,))
    artifact = export(made, tmp_path, "tflite-int8")
    opened = direct(artifact.path, optimize=False)
    assert [t for t in op_types(opened) if t != "TRANSPOSE"] == kinds
    for optimize, share in ((True, 0.999), (False, 0.99)):
        opened = direct(artifact.path, optimize=optimize)
        steps = np.abs(np.rint((run(opened, (PICTURE,))[0] - wanted) / opened.outputs[0].scale))
        assert steps.max() <= 1 and (steps == 0).mean() >= share
