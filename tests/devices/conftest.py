"""Tiny artifacts for the tests of devices."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_artifacts import write_onnx, write_tflite


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("onnx") / "chain.onnx")


@pytest.fixture(scope="session")
def tiny_tflite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tflite(tmp_path_factory.mktemp("tflite") / "chain.tflite")
