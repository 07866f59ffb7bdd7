"""Quantization-aware training of kinds of layers beyond convolutions, and where it starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp import door
from edgecomp.compress.ptq import Quantize
from edgecomp.compress.qat import QuantizeAwareTraining
from edgecomp.compress.rules import Rule
from edgecomp.exporters.onnx import OnnxExporter
from edgecomp.exporters.tflite import TFLiteExporter
from edgecomp.runtimes.litert import LiteRTRuntime
from edgecomp.runtimes.onnxruntime import OnnxRuntime
from tests.compress.test_qat import Net, quality, setting


class Upscale(nn.Module):
    """Transposed convolutions, one of them grouped; inputs that are alike, so that errors can cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2, bias=False)
        self.last = nn.ConvTranspose2d(8, 4, 2, 2, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        alike = x.mean(1, keepdim=True) + 0.1 * x
        return self.last(torch.relu(self.up(torch.relu(self.down(alike)))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(12), nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.head((x + self.attention(h, h, h, need_weights=False)[0]).mean(1))


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(6, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


KINDS = [(Upscale, (3, 8, 8), 8), (Attention, (5, 12), 4), (Gates, (5, 6), 8)]


@pytest.mark.parametrize(("module", "shape", "epochs"), KINDS, ids=["transposed", "attention", "gru"])
def test_four_bit_weights_recover_and_reach_both_files(
    module: type[nn.Module], shape: tuple[int, ...], epochs: int, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    candidate, data, fresh = setting(module(), *shape)
    plain = Quantize(rounding="nearest", weight_bits=4)(candidate, data)
    step = QuantizeAwareTraining(
        weight_bits=4, alpha=1.0, epochs=epochs, batch_size=32, learning_rate=2e-3, validation=0.0
    )
    trained = step(candidate, data)
    assert quality(trained, candidate.module, fresh) > quality(plain, candidate.module, fresh) + 1.0

    last = trained.module.graph.find_nodes(op="output")[0].all_input_nodes[0].name
    scale = float(trained.quantization.activations[last].scale)
    written = OnnxExporter("onnx-qdq").export(trained, data, tmp_path / "m.onnx")
    small = TFLiteExporter("tflite-int8").export(trained, data, tmp_path / "m.tflite")
    assert small.outputs[0].scale == pytest.approx(scale, rel=1e-7)
    ours = door.run_float(OnnxRuntime().open(written.path, optimize=False), [fresh])[0]
    theirs = door.run_float(LiteRTRuntime().open(small.path), [fresh])[0]
    assert np.mean(np.abs(ours - theirs) <= 2.01 * scale) > 0.97


def test_training_starts_from_the_integers_of_another_rounding() -> None:
    torch.manual_seed(3)
    candidate, data, fresh = setting(Net(), 3, 16, 16)
    start = Quantize(observer="minmax", rounding="gptq", weight_bits=4)(candidate, data)
    step = QuantizeAwareTraining(
        rounding="gptq", weight_bits=4, alpha=1.0, epochs=1, batch_size=64, learning_rate=1e-9, validation=0.0
    )
    trained = step(candidate, data)
    expected, found = (quality(c, candidate.module, fresh) for c in (start, trained))
    assert found == pytest.approx(expected, abs=0.05)


def test_rules_hold_in_training() -> None:
    torch.manual_seed(3)
    candidate, data, _ = setting(Net(), 3, 16, 16)
    rules = {"stem": Rule(activation_bits=16), "head": Rule(weight_bits=4)}
    step = QuantizeAwareTraining(rules=rules, alpha=1.0, epochs=1, batch_size=64, validation=0.0)
    plan = step(candidate, data).quantization
    bits = {n: q.spec.bits for n, q in plan.activations.items()}
    assert bits["relu"] == 16 and bits["linear"] == 8
    assert sorted(q.spec.bits for q in plan.weights.values()) == [4, 8, 8, 8]
