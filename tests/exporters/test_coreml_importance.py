"""Importance of weights: against the Jacobian written out, through folded scales, and in the palettes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp.exporters.coreml import CoreMLExporter
from edgecomp.exporters.coreml_importance import Importance, measure
from edgecomp.exporters.coreml_weights import Weight
from edgecomp.runtimes.coreml import CoreMLRuntime
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec


class Samples:
    """A data source of given arrays."""

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __init__(self, inputs: np.ndarray) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield Batch((self.inputs[start : start + size],))


def weight_of(array: np.ndarray, *, module: str = "?", layer: str = "linear", axis: int = 0) -> Weight:
    return Weight("w", module, (layer,), axis, array)


def test_the_estimate_is_the_diagonal_of_the_gauss_newton_matrix() -> None:
    """y = W x: (d y_o / d W_oi)^2 = x_i^2; summed over samples, in expectation over v."""
    layer = nn.Linear(3, 4, bias=False)
    x = torch.tensor([[1.0, 2.0, 0.0]])
    found = measure(layer, [(x,)] * 4000, least=1)
    assert found is not None
    np.testing.assert_allclose(found.values["weight"] / 4000, np.tile([1.0, 4.0, 0.0], (4, 1)), rtol=0.15)
    assert not layer.weight.requires_grad


def test_a_folded_scale_is_found_and_divided_out() -> None:
    rng = np.random.default_rng(0)
    original = rng.normal(size=(3, 5)).astype(np.float32)
    other = rng.normal(size=(3, 5)).astype(np.float32)
    importance = Importance({"a": np.ones((3, 5)), "b": np.full((3, 5), 7.0)}, {"a": other, "b": original})
    scale = np.array([[0.5], [-2.0], [1.0]], np.float32)
    found = importance.of(weight_of((scale * original).astype(np.float16)))
    assert found is not None
    np.testing.assert_allclose(found[:, 0] / found[2, 0], [4.0, 0.25, 1.0], rtol=0.01)
    assert importance.of(weight_of(rng.normal(size=(3, 5)).astype(np.float16))) is None
    assert importance.of(weight_of(original, module="b", layer="gather")) is None


class _Mixed(nn.Module):
    """Only a few inputs are ever large: errors of their weights are what the output shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_weighted_palettes_are_closer_at_the_output(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = _Mixed().eval()
    module.norm.running_var.uniform_(0.5, 2)
    x = np.random.default_rng(0).normal(size=(24, 32, 3, 3)).astype(np.float32)
    x *= np.geomspace(0.01, 3, 32, dtype=np.float32)[:, None, None]
    given = Candidate(module, (TensorSpec("x", (1, 32, 3, 3)),))
    reference = module(torch.from_numpy(x[16:])).detach().numpy()
    noise, notes = {}, {}
    for importance in ("none", "fisher"):
        exporter = CoreMLExporter(assignment="nearest", importance=importance)  # type: ignore[arg-type]
        artifact = exporter.export(
            given, Data(calibration=Samples(x[:16])), tmp_path / f"{importance}.mlpackage"
        )
        session = CoreMLRuntime().open(artifact.path)
        found = np.concatenate([session.run([row[None]])[0] for row in x[16:]])
        noise[importance], notes[importance] = np.square(found - reference).sum(), artifact.history[-1].notes
    assert noise["fisher"] < 0.6 * noise["none"]
    assert not any("counts alike" in n for n in notes["fisher"])


class _Sign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) > 0).int()


def test_a_module_without_gradients_is_exported_all_the_same(tmp_path: Path) -> None:
    data = Data(calibration=Samples(np.ones((2, 64), np.float32)))
    given = Candidate(_Sign().eval(), (TensorSpec("x", (1, 64)),))
    notes = (
        CoreMLExporter(assignment="nearest").export(given, data, tmp_path / "m.mlpackage").history[-1].notes
    )
    assert "palettes: every weight counts alike: the module has no gradients" in notes
