"""`edgecomp inspect`, with a runtime that the test hands in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgecomp import manifest, registry
from edgecomp.cli import inspect, main
from edgecomp.errors import MissingError
from edgecomp.spec import Artifact, OpPlacement, Preprocessing, Problem, StepRecord, TensorSpec

PLACED = [
    OpPlacement("c1", "CONV_2D", "XNNPACK", "int8"),
    OpPlacement("c2", "CONV_2D", "XNNPACK", "int8"),
    OpPlacement("s", "SOFTMAX", "CPU", "float32"),
    OpPlacement("t", "TANH", "CPU", "float32"),
]
INPUT = TensorSpec("x", (1, 28, 28, 1), "int8", "NHWC", 0.5, -3)
OUTPUT = TensorSpec("y", (1, 10), "int8", "NC", 0.25, 7)


class FakeSession:
    inputs = (INPUT,)
    outputs = (OUTPUT,)

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        raise NotImplementedError

    def placement(self) -> list[OpPlacement]:
        return PLACED


class FakeRuntime:
    name = "fake"
    version = "9"

    def open(self, path: Path, *, threads: int = 1, optimize: bool = True) -> FakeSession:
        return FakeSession()


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(registry, "load", lambda room, name: FakeRuntime)
    path = tmp_path / "net.tflite"
    path.write_bytes(b"bytes of a model")
    draft = Artifact(
        path=path,
        format="tflite",
        target="tflite-int8",
        inputs=(INPUT,),
        outputs=(OUTPUT,),
        sha256="",
        size_bytes=0,
        history=(StepRecord("quantize", "quantize", {}),),
        preprocessing=Preprocessing(size=(28, 28)),
        labels=tuple("abc"),
        skipped=(Problem("SOFTMAX", "head", "asked for by name"),),
    )
    manifest.write(manifest.describe(draft, path))
    return path


def test_ops_are_counted_by_type_and_dtype(artifact: Path) -> None:
    assert inspect.facts(artifact)["ops"] == [
        {"type": "CONV_2D", "dtype": "int8", "placed_on": "XNNPACK", "count": 2},
        {"type": "SOFTMAX", "dtype": "float32", "placed_on": "CPU", "count": 1},
        {"type": "TANH", "dtype": "float32", "placed_on": "CPU", "count": 1},
    ]


def test_a_float_op_without_a_reason_is_named(artifact: Path) -> None:
    assert inspect.facts(artifact)["float_without_reason"] == ["t"]


@pytest.mark.parametrize("target", ["tflite-fp32", "onnx-qdq", None])
def test_other_targets_have_float_types_by_design(target: str | None) -> None:
    assert inspect.unexplained_floats(PLACED, target, []) == []


def test_the_table_says_what_the_json_says(artifact: Path) -> None:
    text = CliRunner().invoke(main, ["inspect", str(artifact)]).stdout
    for word in (
        "28x28",
        "NHWC",
        "0.5",
        "-3",
        "CONV_2D",
        "asked for by name",
        "quantize",
        "fake 9",
        "a, b, c",
    ):
        assert word in text
    facts = json.loads(CliRunner().invoke(main, ["inspect", str(artifact), "--json", "-"]).stdout)
    assert facts["target"] == "tflite-int8"
    assert facts["size_bytes"] == 16


def test_a_file_without_manifest_shows_what_the_runtime_says(artifact: Path) -> None:
    manifest.path_of(artifact).unlink()
    facts = inspect.facts(artifact)
    assert facts["inputs"][0]["name"] == "x"
    assert facts["target"] is None
    assert "no manifest" in facts["notes"][0]
    assert CliRunner().invoke(main, ["inspect", str(artifact)]).exit_code == 0


def test_without_the_runtime_the_manifest_still_speaks(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(room: str, name: str) -> None:
        raise MissingError("runtime 'tflite' needs ai_edge_litert")

    monkeypatch.setattr(registry, "load", missing)
    result = CliRunner().invoke(main, ["inspect", str(artifact)])
    assert result.exit_code == 0
    assert "ops not read: runtime 'tflite' needs ai_edge_litert" in result.stdout


def test_a_changed_file_is_refused(artifact: Path) -> None:
    artifact.write_bytes(b"other bytes")
    result = CliRunner().invoke(main, ["inspect", str(artifact)])
    assert result.exit_code == 2
    assert "SHA-256" in result.stderr


@pytest.mark.parametrize("name", ["nothing.tflite", "README.md"])
def test_what_is_no_artifact_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "README.md").write_text("text")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / name)])
    assert result.exit_code == 2
    assert name in result.stderr
