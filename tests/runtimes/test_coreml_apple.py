"""The session that hands over to Core ML, with coremltools' model replaced by a stand-in: no Mac needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from coreml_programs import save_module
from torch import nn

from edgecomp.runtimes import coreml, coreml_apple
from edgecomp.runtimes.coreml import CoreMLRuntime, ReferenceSession
from edgecomp.spec import OpPlacement


class _Model:
    """Stands for `coremltools.models.MLModel`; a test gives it its `predict`."""

    def __init__(self, path: str, compute_units: Any) -> None:
        self.path = path

    def get_compiled_model_path(self) -> str:
        return self.path + "c"


class MLNeuralEngineComputeDevice:
    pass


class _Plan:
    def __init__(self) -> None:
        names = [("ios18.const", "c"), ("ios18.mul", "twice"), ("ios18.add", "other")]
        operations = [
            SimpleNamespace(operator_name=kind, outputs=[SimpleNamespace(name=name)]) for kind, name in names
        ]
        function = SimpleNamespace(block=SimpleNamespace(operations=operations))
        self.model_structure = SimpleNamespace(program=SimpleNamespace(functions={"main": function}))

    @classmethod
    def load_from_path(cls, path: str, compute_units: Any) -> _Plan:
        assert path.endswith(".mlpackagec")
        return cls()

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        if operation.outputs[0].name == "other":
            return None
        return SimpleNamespace(preferred_compute_device=MLNeuralEngineComputeDevice())


class _Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stand_in = SimpleNamespace(
        models=SimpleNamespace(MLModel=_Model, compute_plan=SimpleNamespace(MLComputePlan=_Plan)),
        ComputeUnit=SimpleNamespace(ALL="ALL"),
    )
    path = save_module(_Twice(), [torch.zeros(1, 3)], tmp_path / "m.mlpackage")
    monkeypatch.setattr(coreml_apple, "coremltools", stand_in)
    monkeypatch.setattr(coreml.sys, "platform", "darwin")
    return path


def test_a_mac_predicts_with_core_ml(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = CoreMLRuntime().open(package)
    assert isinstance(session, coreml_apple.AppleSession)
    name = session.outputs[0].name
    double = lambda self, given: {name: given["x0"].astype(np.float64) * 2}  # noqa: E731
    monkeypatch.setattr(_Model, "predict", double, raising=False)
    (found,) = session.run([np.array([[1.0, 2.0, 3.0]])])
    assert found.dtype == np.float32 and found.tolist() == [[2.0, 4.0, 6.0]]


def test_placement_says_where_core_ml_plans_to_run(package: Path) -> None:
    assert CoreMLRuntime().open(package).placement() == [
        OpPlacement("twice", "mul", "neural engine"),
        OpPlacement("other", "add", ""),
    ]


def test_reference_kernels_are_ours_on_a_mac_too(package: Path) -> None:
    for session in (
        CoreMLRuntime().open(package, optimize=False),
        CoreMLRuntime(device="reference").open(package),
    ):
        assert isinstance(session, ReferenceSession)
        assert session.run([np.ones((1, 3), np.float32)])[0].tolist() == [[2.0, 2.0, 2.0]]
