"""The forecast before an export, beside what each runtime then makes of the file."""

from __future__ import annotations

import inspect
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from edgecomp import forecast, manifest, registry
from edgecomp.cli import main
from edgecomp.compress.ptq import Quantize
from edgecomp.errors import InputError
from edgecomp.exporters import onnx_forecast, tflite_forecast
from edgecomp.exporters.tflite_file import Op, Quant, Tensor
from edgecomp.spec import Batch, Candidate, Data, OpPlacement, Preprocessing, TensorSpec

X86 = platform.machine() in ("x86_64", "AMD64")


class Net(nn.Module):
    """A residual block, an operation without an integer kernel, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.block(x)
        x = torch.sin(x)
        return self.head(x.mean((2, 3)))


class Impossible(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x.relu())


class Noise:
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return 8

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        for _ in range(len(self)):
            yield Batch((rng.normal(size=(1, 3, 8, 8)).astype(np.float32),))


def candidate(module: nn.Module) -> Candidate:
    return Candidate(module.eval(), (TensorSpec("x", (1, 3, 8, 8), layout="NCHW"),), original=module)


def line_of(words: str) -> str:
    lines, start = inspect.getsourcelines(Net.forward)
    return f"test_forecast.py:{start + next(i for i, line in enumerate(lines) if words in line)}"


@pytest.mark.parametrize("target", ["tflite-int8", "onnx-qdq", "coreml-pal4", "tflite-fp32"])
def test_what_was_told_without_data_is_what_the_runtime_makes(target: str, tmp_path: Path) -> None:
    start = candidate(Net())
    told = forecast.forecast(start, target)
    quantized = Quantize(samples=8, rounding="nearest")(start, Data(calibration=Noise()))
    source = start if target in ("coreml-pal4", "tflite-fp32") else quantized
    path = tmp_path / {"t": "n.tflite", "o": "n.onnx", "c": "n.mlpackage"}[target[0]]
    manifest.write(registry.load("exporters", target)(target=target).export(source, Data(), path))
    session = registry.load("runtimes", registry.format_of(target))().open(path)
    found = forecast.against(told, forecast.realized(session))
    assert found["operations"] > 2 and found["differ"] == 0
    if target != "tflite-fp32":
        assert found["integer"]["hits"] > 0
        assert (found["integer"]["precision"], found["integer"]["recall"]) == (1.0, 1.0)
    if target.startswith("tflite"):
        assert (found["delegated"]["precision"], found["delegated"]["recall"]) == (1.0, 1.0)


@pytest.mark.parametrize("target", ["tflite-fp32", "onnx-qdq"])
def test_a_float_operation_has_its_reason_and_the_line_of_the_user_s_code(target: str) -> None:
    rows = forecast.forecast(candidate(Net()), target)
    sine = next(r for r in rows if r["type"].upper() == "SIN")
    assert sine["runs"] == "float" and sine["why"] and sine["line"] == line_of("torch.sin")


def test_what_a_target_cannot_express_runs_not_at_all() -> None:
    rows = forecast.forecast(candidate(Impossible()), "tflite-int8")
    assert [r["runs"] for r in rows] == ["none"]
    assert "bessel_j0" in rows[0]["type"] and "no TFLite operation" in rows[0]["why"]


def test_a_value_that_two_read_stays_int8_on_x86_and_its_maker_in_float() -> None:
    ready = forecast.planned(candidate(Net()))
    runs = {r.node: r for r in onnx_forecast.forecast(ready, "onnx-qdq")}
    if X86:
        # The stem's input has one reader and becomes uint8; its result has two and stays int8.
        assert runs["conv2d"].runs == "float" and "one side is uint8" in runs["conv2d"].why
    else:
        assert runs["conv2d"].runs == "integer"
    assert runs["relu"].runs == "inside" and runs["mean"].runs == "float"


def test_scores_by_hand() -> None:
    told = [
        {"name": n, "type": "OP", "runs": r, "placed_on": p}
        for n, r, p in [
            ("a", "integer", "X"),
            ("b", "integer", "X"),
            ("c", "float", "CPU"),
            ("d", "float", "X"),
        ]
    ]
    told += [{"name": "", "type": "fft", "runs": "none", "placed_on": ""}]
    actual = [
        OpPlacement("a", "OP", "X", "int8"),
        OpPlacement("b", "OP", "CPU", "float32"),
        OpPlacement("c", "OP", "CPU", "int8"),
    ]
    found = forecast.against(told, actual)
    assert [r["actual"] for r in found["rows"]] == ["integer", "float", "integer", "inside"]
    assert found["integer"] == {"told": 2, "was": 2, "hits": 1, "precision": 0.5, "recall": 0.5}
    assert found["delegated"] == {"told": 2, "was": 1, "hits": 1, "precision": 0.5, "recall": 1.0}
    assert found["differ"] == 2 and found["operations"] == 3


@pytest.mark.parametrize("scale, place", [(1.0, "XNNPACK"), (2.0**-11, "CPU"), (2.0**9, "CPU")])
def test_operands_of_far_scales_are_not_delegated(scale: float, place: str) -> None:
    x, y, z = (Tensor(n, (1, 4), "int8", Quant.of(s)) for n, s in (("x", 1.0), ("y", scale), ("z", 1.0)))
    op = Op("ADD", [x, y], [z])
    assert tflite_forecast.place(op) == place
    assert ("too far apart" in tflite_forecast._reason(op, True)) is (place == "CPU")
    assert "no kernel for SOFTMAX of int8" in tflite_forecast._reason(Op("SOFTMAX", [x], [z]), True)


def test_the_commands(tmp_path: Path) -> None:
    spec = f"{__file__}:Net"
    words = ["inspect", spec, "--target", "onnx-qdq", "--input-shape", "1,3,8,8"]
    shown = CliRunner().invoke(main, words)
    assert shown.exit_code == 0, shown.output
    assert "forecast for onnx-qdq" in shown.stdout and line_of("torch.sin") in shown.stdout
    quantized = Quantize(samples=8, rounding="nearest")(candidate(Net()), Data(calibration=Noise()))
    path = tmp_path / "n.onnx"
    manifest.write(registry.load("exporters", "onnx-qdq")(target="onnx-qdq").export(quantized, Data(), path))
    facts = json.loads(
        CliRunner().invoke(main, ["inspect", str(path), "--model", spec, "--json", "-"]).stdout
    )
    assert facts["forecast"]["differ"] == 0 and facts["forecast"]["target"] == "onnx-qdq"
    assert {row["type"] for row in facts["kernels"]} >= {"QGemm", "Sin"}
    beside = CliRunner().invoke(main, ["inspect", str(path), "--model", spec])
    assert "runs in integers: told" in beside.stdout
    both = CliRunner().invoke(main, ["inspect", str(path), "--model", spec, "--target", "onnx-qdq"])
    assert both.exit_code == 2 and "one of the two" in both.stderr


def test_an_artifact_of_another_tool_has_no_forecast(tmp_path: Path) -> None:
    (tmp_path / "n.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="no manifest"):
        forecast.of_artifact(tmp_path / "n.onnx", forecast.Model("m.py:net"))
