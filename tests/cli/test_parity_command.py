"""`edgecomp parity` and `edgecomp verify`, with a runtime that the test hands in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgecomp import golden, manifest, registry
from edgecomp.cli import main
from edgecomp.loading import open_data
from edgecomp.spec import Artifact, OpPlacement, TensorSpec

MODEL = """
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        return x @ torch.tensor([[1.0, -1.0], [0.5, 2.0]])

def net():
    return Net()
"""


class FakeSession:
    inputs = (TensorSpec("x", (1, 2), "float32", "NC"),)
    outputs = (TensorSpec("y", (1, 2), "int8", "NC", 0.05, 0),)
    gain = 1.0

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        y = arrays[0] @ np.array([[1.0, -1.0], [0.5, 2.0]]) * self.gain
        return [np.clip(np.rint(y / 0.05), -128, 127).astype(np.int8)]

    def placement(self) -> list[OpPlacement]:
        return []


class FakeRuntime:
    name = "fake"
    version = "1"

    def open(self, path: Path, *, threads: int = 1, optimize: bool = True) -> FakeSession:
        return FakeSession()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    load = registry.load
    monkeypatch.setattr(
        registry, "load", lambda room, name: FakeRuntime if room == "runtimes" else load(room, name)
    )
    monkeypatch.setattr(FakeSession, "gain", 1.0)
    (tmp_path / "net.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=(x[:, 1] > 0.3).astype(int), labels=["no", "yes"])
    path = tmp_path / "net.tflite"
    path.write_bytes(b"fake")
    artifact = Artifact(
        path, "tflite", "tflite-int8", FakeSession.inputs, FakeSession.outputs, "", 0, labels=("no", "yes")
    )
    artifact = manifest.describe(artifact, path)
    done = golden.record(artifact, open_data(str(tmp_path / "d.npz")), lambda a: [a[0]])
    manifest.write(done)
    return tmp_path


def invoke(folder: Path, *words: str) -> Result:
    base = ["parity", f"{folder}/net.py:net", f"{folder}/net.tflite", "--data", f"{folder}/d.npz"]
    return CliRunner().invoke(main, [*base, *words])


def test_figures_as_table_and_json(folder: Path) -> None:
    result = invoke(folder, "--gate", "sqnr_db > 25", "--gate", "top1_agreement >= 0.95")
    assert result.exit_code == 0, result.stderr
    assert "net.tflite" in result.stdout and "accuracy" in result.stdout and "passed" in result.stdout
    facts = json.loads(invoke(folder, "--json", "-").stdout)
    entry = facts["artifacts"][0]
    assert facts["reference"].endswith("net.py:net")
    assert entry["samples"] == 400 and entry["target"] == "tflite-int8" and entry["passed"]


def test_a_failed_gate_is_exit_code_1_and_named(folder: Path) -> None:
    result = invoke(folder, "--gate", "sqnr_db > 90")
    assert result.exit_code == 1
    assert "FAILED  net.tflite: sqnr_db > 90" in result.stdout
    assert "1 of 1 gates failed" in result.stderr and "Traceback" not in result.stderr


def test_too_few_samples_fail_a_gate_on_a_share(folder: Path) -> None:
    result = invoke(folder, "--limit", "20", "--gate", "top1_agreement >= 0.98")
    assert result.exit_code == 1 and "at least 189 are needed" in result.stderr


@pytest.mark.parametrize(
    "words, message",
    [(("--gate", "good"), "expected NAME OP NUMBER"), (("--gate", "sqnr > 3"), "did you mean 'sqnr_db'")],
)
def test_a_wrong_gate_is_exit_code_2(folder: Path, words: tuple[str, ...], message: str) -> None:
    result = invoke(folder, *words)
    assert result.exit_code == 2 and message in result.stderr


def test_another_model_and_missing_files_are_exit_code_2(folder: Path) -> None:
    (folder / "other.py").write_text(MODEL.replace("[[1.0, -1.0], [0.5, 2.0]]", "[[1.0], [2.0]]"))
    data = ["--data", f"{folder}/d.npz"]
    other = CliRunner().invoke(main, ["parity", f"{folder}/other.py:net", f"{folder}/net.tflite", *data])
    assert other.exit_code == 2 and "not the same model" in other.stderr
    missing = CliRunner().invoke(main, ["parity", f"{folder}/net.py:net", f"{folder}/no.tflite", *data])
    assert missing.exit_code == 2 and "no artifact" in missing.stderr


def test_verify_replays_and_notices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = CliRunner().invoke(main, ["verify", f"{folder}/net.tflite"])
    assert good.exit_code == 0 and "same" in good.stdout
    monkeypatch.setattr(FakeSession, "gain", 1.2)
    bad = CliRunner().invoke(main, ["verify", f"{folder}/net.tflite", "--json", "-"])
    assert bad.exit_code == 1 and json.loads(bad.stdout)["passed"] is False
    assert "differs from its golden value" in bad.stderr
    (folder / "net.tflite").write_bytes(b"other")
    assert CliRunner().invoke(main, ["verify", f"{folder}/net.tflite"]).exit_code == 2


def test_what_a_model_prints_does_not_get_into_the_results(folder: Path) -> None:
    (folder / "net.py").write_text(MODEL.replace("    return Net()", "    print('loaded')\n    return Net()"))
    result = invoke(folder, "--json", "-")
    assert json.loads(result.stdout)["artifacts"] and "loaded" in result.stderr
