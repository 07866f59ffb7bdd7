"""The manifest: keys of docs/contract.md, there and back, damage found."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from edgecomp import manifest
from edgecomp.errors import ArtifactError
from edgecomp.spec import Artifact, Preprocessing, Problem, StepRecord, TensorSpec

KEYS = [
    "format",
    "target",
    "inputs",
    "outputs",
    "preprocessing",
    "labels",
    "size_bytes",
    "sha256",
    "golden",
    "recipe_sha256",
    "history",
    "versions",
    "skipped",
]


@pytest.fixture
def written(tmp_path: Path) -> Artifact:
    path = tmp_path / "net.tflite"
    path.write_bytes(b"model")
    draft = Artifact(
        path=path,
        format="tflite",
        target="tflite-int8",
        inputs=(TensorSpec("x", (1, 28, 28, 1), "int8", "NHWC", 0.5, -3),),
        outputs=(TensorSpec("y", (1, 10), "int8", "NC", 0.25, 7),),
        sha256="",
        size_bytes=0,
        history=(StepRecord("quantize", "quantize", {"samples": 3}, ("a note",)),),
        preprocessing=Preprocessing(size=(28, 28), mean=(0.5,), std=(0.25,)),
        labels=("a", "b"),
        skipped=(Problem("softmax", "head", "asked for"),),
        recipe_sha256="12",
        golden="net.tflite.golden.npz",
        versions={"torch": "2.13.0"},
    )
    artifact = manifest.describe(draft, path)
    manifest.write(artifact)
    return artifact


def test_what_is_written_comes_back(written: Artifact) -> None:
    assert manifest.read(written.path) == written


def test_the_keys_are_those_of_the_contract(written: Artifact) -> None:
    facts = json.loads(manifest.path_of(written.path).read_text())
    assert list(facts) == KEYS
    assert set(facts["inputs"][0]) == {"name", "shape", "dtype", "layout", "scale", "zero_point"}
    contract = (Path(__file__).parents[2] / "docs" / "contract.md").read_text()
    assert all(f"`{key}`" in contract for key in KEYS)


def test_what_is_embedded_lacks_what_only_the_whole_file_has(written: Artifact) -> None:
    facts = json.loads(manifest.embedded(written))
    assert set(KEYS) - set(facts) == {"sha256", "size_bytes", "golden"}
    assert list(facts) == sorted(facts)


def test_a_changed_artifact_is_found(written: Artifact) -> None:
    written.path.write_bytes(b"model.")
    with pytest.raises(ArtifactError, match="SHA-256"):
        manifest.read(written.path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "tflite"}'])
def test_a_damaged_manifest_is_named(written: Artifact, text: str) -> None:
    manifest.path_of(written.path).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        manifest.read(written.path)


def test_a_missing_artifact_or_manifest_is_named(written: Artifact) -> None:
    manifest.path_of(written.path).unlink()
    with pytest.raises(ArtifactError, match="has no manifest"):
        manifest.read(written.path)
    written.path.unlink()
    with pytest.raises(ArtifactError, match="no artifact at"):
        manifest.read(written.path)


def test_versions_name_python_and_what_is_installed() -> None:
    found = manifest.versions("onnx", "no-such-distribution")
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__ and found["onnx"] == metadata.version("onnx")
    assert "no-such-distribution" not in found
