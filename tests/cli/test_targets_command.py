"""`edgecomp targets`: what can be built here, from package metadata alone."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edgecomp import registry
from edgecomp.cli import main, needs, targets


def test_every_registered_target_has_a_row_and_ours_a_description() -> None:
    rows = json.loads(CliRunner().invoke(main, ["targets", "--json", "-"]).stdout)
    assert [row["name"] for row in rows] == registry.names("exporters")
    assert all(row["name"] in targets.WHAT for row in rows if row["from"] == "edgecomp")


def test_a_missing_library_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = needs.version_of
    monkeypatch.setattr(needs, "version_of", lambda n: None if n == "coremltools" else installed(n))
    rows = {row["name"]: row for row in targets.facts()}
    assert rows["coreml-pal4"]["built_here"] is False
    assert rows["coreml-pal4"]["missing"] == ["coremltools"]
    assert rows["coreml-pal4"]["install"] == "pip install 'edgecomp[coreml]'"
    assert rows["onnx-qdq"]["built_here"] is True
    shown = CliRunner().invoke(main, ["targets"]).stdout
    assert "pip install 'edgecomp[coreml]'" in shown


def test_another_runtime_stands_in_for_litert(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"tflite-runtime": "2.14.0"}
    monkeypatch.setattr(needs, "version_of", there.get)
    assert needs.missing_from(["ai-edge-litert", "flatbuffers"]) == ["flatbuffers"]


def test_requirements_of_an_extra_are_names_without_versions() -> None:
    assert {"onnx", "onnxruntime"} <= set(needs.required_by("edgecomp", "onnx"))
    assert "onnx" not in needs.required_by("edgecomp")
    assert "torch" in needs.required_by("edgecomp")


def test_extras_are_those_that_users_install() -> None:
    assert {"tflite", "onnx", "coreml", "ssh", "adb", "report"} <= set(needs.extras())
    assert not {"dev", "all"} & set(needs.extras())
