"""Files of 8 and 16 bits: an optimized session of ONNX Runtime, a division among wide values in TFLite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from onnx_support import Rows, candidate_of
from torch import Tensor, nn

from edgecomp.compress.ptq import Quantize
from edgecomp.compress.rules import Rule
from edgecomp.exporters.onnx import OnnxExporter
from edgecomp.exporters.tflite import TFLiteExporter
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.runtimes.litert import LiteRTRuntime
from edgecomp.runtimes.onnxruntime import OnnxRuntime
from edgecomp.spec import Candidate, Data


class Normalized(nn.Module):
    """Layer normalization in 16 bits before a linear layer that reads 8 bits of three axes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


class Pooled(nn.Module):
    """A mean over what a mask leaves, as of sentence encoders: its divisor is a sum that is never zero."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weight = mask.float()[..., None]
        return (x * weight).sum(1) / weight.sum(1)


SEQUENCES = np.random.default_rng(0).standard_normal((8, 6, 32)).astype(np.float32)
MASKS = (np.arange(6) < np.arange(1, 9)[:, None].clip(1, 6)).astype(np.int64)


def quantized(module: nn.Module, *arrays: np.ndarray, **rules: Rule) -> Candidate:
    given = candidate_of(module, *(torch.from_numpy(a[:1]) for a in arrays))
    step = Quantize(rounding="nearest", rules={k.replace("_of_", ":"): r for k, r in rules.items()})
    return step(given, Data(calibration=Rows(arrays)))


def test_optimized_sessions_open_what_the_graph_as_written_computes(tmp_path: Path) -> None:
    wide, narrow = Rule(activation_bits=16), Rule(activation_bits=8)
    made = quantized(Normalized().eval(), SEQUENCES, norm=wide, node_of_add_1=narrow)
    out = tmp_path / "m.onnx"
    OnnxExporter("onnx-qdq").export(made, Data(), out)
    found = [OnnxRuntime().open(out, optimize=o).run([SEQUENCES[:1]])[0] for o in (False, True)]
    expected = fake_quantize(made.module, made.quantization)(torch.from_numpy(SEQUENCES[:1])).numpy()
    step = float(made.quantization.activations["linear"].scale)
    assert all(np.abs(f - expected).max() <= 1.01 * step for f in found)


def test_a_divisor_of_8_bits_among_16_bit_values_is_known_to_be_positive(tmp_path: Path) -> None:
    made = quantized(Pooled(), SEQUENCES, MASKS, type_of_mul=Rule(activation_bits=16))
    division = next(n for n in made.module.graph.nodes if n.target is torch.ops.aten.div.Tensor)
    widths = [made.quantization.activations[n.name].spec.bits for n in division.args]
    out = tmp_path / "m.tflite"
    exporter = TFLiteExporter("tflite-int8")
    exporter.export(made, Data(), out)
    session = LiteRTRuntime().open(out)
    graph = fake_quantize(made.module, made.quantization)
    assert widths[1] == 8
    for row in range(8):
        inputs = [SEQUENCES[row : row + 1], MASKS[row : row + 1]]
        expected = graph(*map(torch.from_numpy, inputs))
        stored = [
            np.clip(np.rint(a / d.scale) + d.zero_point, -128, 127).astype(d.dtype)
            if d.scale
            else a.astype(d.dtype)
            for a, d in zip(inputs, session.inputs, strict=True)
        ]
        (found,) = session.run(stored)
        door = session.outputs[0]
        real = (found.astype(np.float32) - door.zero_point) * door.scale
        assert np.abs(real - expected.numpy()).max() <= 4.01 * door.scale
