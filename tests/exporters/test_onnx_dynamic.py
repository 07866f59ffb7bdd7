"""`onnx-dynamic`: int8 weights in the file, activations quantized when the model runs; no calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx_support import candidate_of, export, normal
from torch import Tensor, nn

from edgecomp.numerics.metrics import sqnr_db
from edgecomp.runtimes.onnxruntime import OnnxRuntime


class Rows(nn.Module):
    """A shared linear layer, one without a bias, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pictures = nn.Conv2d(3, 16, 4, 4)
        self.shared, self.plain = nn.Linear(16, 16), nn.Linear(16, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pictures(x).flatten(2).transpose(1, 2)
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        return self.plain(x.mean(1))


def test_linear_layers_multiply_integers_and_stay_close_to_float(tmp_path: Path) -> None:
    x = normal(1, 3, 16, 16)
    candidate = candidate_of(Rows(), x)
    artifact = export(candidate, tmp_path / "m.onnx", "onnx-dynamic")
    kinds = [n.op_type for n in onnx.load(str(artifact.path)).graph.node]
    assert kinds.count("MatMulInteger") == 3
    assert kinds.count("DynamicQuantizeLinear") == 3
    exact = candidate.module(x).detach().numpy()
    for optimize in (False, True):
        found = OnnxRuntime().open(artifact.path, optimize=optimize).run([x.numpy()])[0]
        assert sqnr_db(exact, found) > 30.0


def test_every_weight_is_stored_once_in_eight_bits(tmp_path: Path) -> None:
    artifact = export(candidate_of(Rows(), normal(1, 3, 16, 16)), tmp_path / "m.onnx", "onnx-dynamic")
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(str(artifact.path)).graph.initializer}
    weights = {n: a for n, a in stored.items() if "_quantized" in n}
    assert {a.dtype for a in weights.values()} == {np.dtype(np.int8)}
    assert sorted(a.size for a in weights.values()) == [96, 256, 768]
    assert not [n for n, a in stored.items() if a.dtype == np.float32 and a.size > 16]


def test_per_channel_scales_are_the_largest_weight_over_127(tmp_path: Path) -> None:
    module = nn.Linear(4, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.27, 0.5, 0.0, -0.3], [0.0, -2.54, 1.0, 0.02]]))
    artifact = export(candidate_of(module, torch.zeros(1, 4)), tmp_path / "m.onnx", "onnx-dynamic")
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(str(artifact.path)).graph.initializer}
    assert np.allclose(stored["weight_scale"], [0.01, 0.02])
    assert stored["weight_quantized_turned"].T.tolist() == [[127, 50, 0, -30], [0, -127, 50, 1]]
