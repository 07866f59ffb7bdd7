"""`edgecomp init`: a recipe that reads back, with what the data and the model do not allow left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgecomp import recipe, registry
from edgecomp.cli import main
from edgecomp.errors import MissingError

_MODELS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 150, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2400, 3)
    )

class Svd(nn.Module):
    def forward(self, x):
        return torch.linalg.svd(x[0])[1]

def svd():
    return Svd()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(_MODELS)
    inputs = np.random.default_rng(0).normal(size=(12, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=np.arange(12) % 3)
    np.save(tmp_path / "bare.npy", inputs)
    return tmp_path


def init(*words: str) -> Result:
    return CliRunner().invoke(main, ["init", *words])


def test_with_all_data_every_step_and_target_is_taken(folder: Path) -> None:
    result = init("nets.py:build", "--data", "data.npz", "--calib", "data.npz", "--train", "data.npz")
    assert result.exit_code == 0, result.stderr
    written = recipe.read(folder / "recipe.yaml").recipe
    assert [s.name for s in written.steps] == ["prune", "distill", "quantize"]
    assert [e.target for e in written.exports] == ["tflite-int8", "onnx-qdq", "coreml-pal4"]
    assert written.gates_of("onnx-qdq") == ("metric.delta >= -0.03",)
    # 16 * (9 + 1) + 150 * (16 * 9 + 1) + 2400 * 3 + 3
    assert "29,113 parameters" in (folder / "recipe.yaml").read_text()


def test_without_calibration_data_integer_targets_are_left_out_with_the_reason(folder: Path) -> None:
    result = init("nets.py:build", "--data", "bare.npy")
    assert result.exit_code == 0, result.stderr
    assert "# - tflite-int8   # needs calibration data" in (folder / "recipe.yaml").read_text()
    written = recipe.read(folder / "recipe.yaml").recipe
    assert written.steps == ()
    assert [e.target for e in written.exports] == ["coreml-pal4"]
    assert written.gates_of("coreml-pal4") == ("sqnr_db > 10",)


def test_an_operation_that_no_target_has_is_named(folder: Path) -> None:
    result = init("nets.py:svd", "--data", "bare.npy", "--calib", "bare.npy")
    assert result.exit_code == 0, result.stderr
    assert "svd" in (folder / "recipe.yaml").read_text().partition("exports: []")[2]


def test_a_missing_library_is_named_with_its_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = registry.load

    def without_coreml(room: str, name: str) -> object:
        if name == "coreml-pal4":
            raise MissingError("target 'coreml-pal4' needs coremltools: pip install 'edgecomp[coreml]'")
        return load(room, name)

    monkeypatch.setattr(registry, "load", without_coreml)
    assert init("nets.py:build", "--data", "data.npz", "--calib", "data.npz").exit_code == 0
    assert "# target 'coreml-pal4' needs coremltools" in (folder / "recipe.yaml").read_text()


def test_preprocessing_goes_into_the_recipe(folder: Path) -> None:
    (folder / "how.yaml").write_text("size: [8, 8]\nmean: [0.5]\ncolour_order: L\n")
    result = init("nets.py:build", "--data", "bare.npy", "--preprocessing", "how.yaml")
    assert result.exit_code == 0, result.stderr
    decided = recipe.read(folder / "recipe.yaml").recipe.data.evaluation.decided()
    assert decided is not None
    assert (decided.size, decided.mean, decided.colour_order) == ((8, 8), (0.5,), "L")


def test_names_that_yaml_would_misread_are_quoted(folder: Path) -> None:
    odd = folder / "a: b # c"
    odd.mkdir()
    (folder / "bare.npy").rename(odd / "bare.npy")
    assert init("nets.py:build", "--data", "a: b # c/bare.npy").exit_code == 0
    assert recipe.read(folder / "recipe.yaml").recipe.data.evaluation.source == "a: b # c/bare.npy"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nets.py:build"], "missing option '--data'"),
        (["nets.py:bild", "--data", "bare.npy"], "did you mean 'build'?"),
        (["nets.py:build", "--data", "none.npz"], "none.npz"),
        (["nets.py:build", "--data", "bare.npy", "--preprocessing", "none.yaml"], "none.yaml"),
    ],
)
def test_bad_input_writes_nothing(folder: Path, words: list[str], expected: str) -> None:
    result = init(*words)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert not (folder / "recipe.yaml").exists()
