"""`edgecomp inspect` shows bits per weight, by layer, as each format stores them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from edgecomp import manifest
from edgecomp.cli import inspect
from edgecomp.compress.groupwise import QuantizeWeights
from edgecomp.exporters.coreml import CoreMLExporter
from edgecomp.exporters.onnx import OnnxExporter
from edgecomp.exporters.tflite import TFLiteExporter
from edgecomp.spec import Candidate, Data, TensorSpec

EXPORTERS = {".onnx": OnnxExporter, ".tflite": TFLiteExporter, ".mlpackage": CoreMLExporter}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(64, 64)
        self.fc = nn.Linear(64, 32, bias=False)
        self.out = nn.Linear(32, 16, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.fc(self.table(ids))))


def shown(path: Path, target: str, **settings: object) -> dict[str, dict]:
    begun = Candidate(Small().eval(), (TensorSpec("ids", (1, 4), "int64"),))
    step = QuantizeWeights(method="rtn", narrow=True, exclude=("out",), **settings)  # type: ignore[arg-type]
    manifest.write(EXPORTERS[path.suffix](target).export(step(begun, Data()), Data(), path))
    facts = inspect.facts(path)
    assert facts["weights"] is not None
    return {w["name"].removesuffix("_to_fp16").replace("_", "."): w for w in facts["weights"]}


# Bits of a scale for 32 weights: float32 in ONNX, float16 in Core ML and in TFLite's linear layers.
@pytest.mark.parametrize(
    "file, table, linear, left",
    [("m.onnx", 5.0, 5.0, 32.0), ("m.tflite", 5.0, 4.5, 32.0), ("m.mlpackage", 4.5, 4.5, 16.0)],
)
def test_bits_per_weight(tmp_path: Path, file: str, table: float, linear: float, left: float) -> None:
    target = {".onnx": "onnx-int4", ".tflite": "tflite-int4", ".mlpackage": "coreml-int4"}
    found = shown(tmp_path / file, target[Path(file).suffix])
    assert found["table.weight"]["bits"] == pytest.approx(table)
    assert found["fc.weight"]["bits"] == pytest.approx(linear)
    assert found["fc.weight"]["elements"] == 64 * 32
    assert found["out.weight"]["bits"] in (pytest.approx(left), pytest.approx(8 + 32 / 32))


def test_zero_points_count(tmp_path: Path) -> None:
    found = shown(tmp_path / "m.onnx", "onnx-int4", symmetric=False)
    assert found["fc.weight"]["bits"] == pytest.approx(5 + 4 / 32)


def test_the_table_is_printed_with_its_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from click.testing import CliRunner

    shown(tmp_path / "m.onnx", "onnx-int4")
    result = CliRunner().invoke(inspect.command, [str(tmp_path / "m.onnx")])
    assert result.exit_code == 0, result.output
    assert "bits per weight" in result.output and "in all" in result.output and sys.stdout
