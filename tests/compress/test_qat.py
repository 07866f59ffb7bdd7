"""Quantization-aware training: what it learns, and that the artifacts carry it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from edgecomp import door
from edgecomp.compress.ptq import Quantize
from edgecomp.compress.qat import QuantizeAwareTraining
from edgecomp.errors import DataError, ModelError, RecipeError
from edgecomp.exporters.onnx import OnnxExporter
from edgecomp.exporters.tflite import TFLiteExporter
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.numerics.metrics import sqnr_db
from edgecomp.runtimes.litert import LiteRTRuntime
from edgecomp.runtimes.onnxruntime import OnnxRuntime
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec


class Net(nn.Module):
    """Depthwise, residual, batch norm, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.project, self.head = nn.Conv2d(16, 24, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + nn.functional.relu6(self.depthwise(x))
        return self.head(torch.relu(self.project(x)).mean((2, 3)))


class Keyword(nn.Module):
    """An LSTM over frames."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


@dataclass
class Arrays:
    x: np.ndarray
    y: np.ndarray | None = None
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Batch((self.x[part],), None if self.y is None else self.y[part])


def pictures(count: int, *shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def setting(module: nn.Module, *shape: int) -> tuple[Candidate, Data, np.ndarray]:
    torch.manual_seed(0)
    train = Arrays(pictures(200, *shape, seed=1))
    candidate = Candidate(module.eval(), (TensorSpec("x", (1, *shape)),))
    return candidate, Data(train=train, calibration=train), pictures(48, *shape, seed=2)


def quality(candidate: Candidate, reference: nn.Module, fresh: np.ndarray) -> float:
    rounded = fake_quantize(candidate.module, candidate.quantization)  # type: ignore[arg-type]
    with torch.no_grad():
        exact = reference(torch.from_numpy(fresh)).numpy()
        found = np.concatenate(
            [rounded(torch.from_numpy(fresh[i : i + 1])).numpy() for i in range(len(fresh))]
        )
    return sqnr_db(exact, found)


@pytest.mark.parametrize(("module", "shape", "gain_db"), [(Net, (3, 16, 16), 3.0), (Keyword, (5, 6), 1.0)])
def test_four_bit_weights_recover_without_labels(
    module: type[nn.Module], shape: tuple[int, ...], gain_db: float
) -> None:
    torch.manual_seed(3)
    candidate, data, fresh = setting(module(), *shape)
    nearest = Quantize(observer="minmax", rounding="nearest", bias_correction="none", weight_bits=4)
    plain = nearest(candidate, data)
    trained = QuantizeAwareTraining(
        weight_bits=4, alpha=1.0, epochs=12, batch_size=32, learning_rate=2e-3, validation=0.0
    )(candidate, data)
    assert quality(trained, candidate.module, fresh) > quality(plain, candidate.module, fresh) + gain_db
    assert trained.history[-1].name == "qat"


def test_trained_scales_reach_both_artifacts(tmp_path: Path) -> None:
    torch.manual_seed(3)
    candidate, data, fresh = setting(Net(), 3, 16, 16)
    start = Quantize(rounding="nearest")(candidate, data)
    trained = QuantizeAwareTraining(alpha=1.0, epochs=2, batch_size=32, learning_rate=1e-3)(candidate, data)
    plan = trained.quantization
    assert plan is not None and start.quantization is not None
    moved = [n for n, q in plan.activations.items() if q.scale != start.quantization.activations[n].scale]
    assert len(moved) > 3

    written = OnnxExporter("onnx-qdq").export(trained, data, tmp_path / "m.onnx")
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(str(written.path)).graph.initializer}
    for name, weight in plan.weights.items():
        np.testing.assert_array_equal(stored[f"{name}_scale"], weight.scale)
    last = plan.activations[trained.module.graph.find_nodes(op="output")[0].all_input_nodes[0].name]
    small = TFLiteExporter("tflite-int8").export(trained, data, tmp_path / "m.tflite")
    assert small.outputs[0].scale == pytest.approx(float(last.scale), rel=1e-7)

    ours = door.run_float(OnnxRuntime().open(written.path, optimize=False), [fresh])[0]
    theirs = door.run_float(LiteRTRuntime().open(small.path), [fresh])[0]
    assert np.abs(ours - theirs).max() <= float(last.scale) * 1.01


def test_training_starts_from_activations_widened_to_a_given_noise() -> None:
    torch.manual_seed(3)
    candidate, data, fresh = setting(Net(), 3, 16, 16)
    common: dict[str, Any] = {"alpha": 1.0, "epochs": 2, "batch_size": 32, "learning_rate": 1e-4}
    narrow = QuantizeAwareTraining(**common)(candidate, data)
    wide = QuantizeAwareTraining(**common, activation_sqnr_db=60.0)(candidate, data)
    assert wide.quantization is not None
    assert {q.spec.bits for q in wide.quantization.activations.values()} == {8, 16}
    assert quality(wide, candidate.module, fresh) > quality(narrow, candidate.module, fresh) + 1
    assert any(note.startswith("16-bit activations in") for note in wide.history[-1].notes)


def test_original_is_left_alone_and_labels_are_used() -> None:
    torch.manual_seed(3)
    candidate, data, _ = setting(Net(), 3, 16, 16)
    before = {k: v.clone() for k, v in candidate.module.state_dict().items()}
    labels = np.random.default_rng(0).integers(0, 5, 200)
    source = Arrays(data.train.x, labels)  # type: ignore[union-attr]
    QuantizeAwareTraining(alpha=0.0, epochs=1)(candidate, Data(train=source, calibration=source))
    assert all(torch.equal(v, before[k]) for k, v in candidate.module.state_dict().items())


def test_bad_settings_and_missing_data_are_named() -> None:
    candidate, data, _ = setting(Net(), 3, 16, 16)
    with pytest.raises(RecipeError, match=r"alpha is 2.0; expected a share from 0 to 1"):
        QuantizeAwareTraining(alpha=2.0)
    with pytest.raises(DataError, match="qat' needs training data"):
        QuantizeAwareTraining()(candidate, Data(calibration=data.calibration))
    with pytest.raises(ModelError, match="comes after quantize"):
        QuantizeAwareTraining()(Quantize(rounding="nearest")(candidate, data), data)
    with pytest.raises(DataError, match="training needs targets"):
        QuantizeAwareTraining(alpha=0.5, epochs=1)(candidate, replace(data))
