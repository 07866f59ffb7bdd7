from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgecomp import pipeline_export as exporting
from edgecomp import trial
from edgecomp.budget import PruneToBudget
from edgecomp.compress.macs import count_macs
from edgecomp.errors import ModelError, RecipeError
from edgecomp.recipe import ProfileEntry
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec


class Noise:
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return 16

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        values = np.random.default_rng(0).normal(size=(16, 1, 8, 8)).astype(np.float32)
        for start in range(0, 16, size):
            yield Batch((values[start : start + size],))


def candidate() -> Candidate:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 3)
    )
    return Candidate(module.eval(), (TensorSpec("x", (1, 1, 8, 8), layout="NCHW"),))


def test_a_file_ends_just_under_its_bytes() -> None:
    start = candidate()
    result = PruneToBudget(target="tflite-fp32", size_bytes=90_000, tolerance=0.1, round_to=1)(start, Data())
    assert result.history[-1].name == "prune-to-budget" and result.history[-1].kind == "prune"
    last = [n for n in result.history[-1].notes if "the budget is" in n][-1]
    assert 81_000 <= float(last.split(": ")[1].split(",")[0]) <= 90_000
    assert start.module[0].out_channels == 64 > result.module[0].out_channels


def test_latency_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose latency is 1 ms for each 100,000 multiply-accumulates of the integer file."""
    asked: list[Any] = []
    start = candidate()
    made: dict[str, int] = {}
    original = trial.Quantize.__call__

    def noting(self: Any, module: Candidate, data: Data) -> Candidate:
        made["macs"] = count_macs(module.module, (torch.zeros(1, 1, 8, 8),))
        return original(self, module, data)

    def profiles(path: Any, devices: Any, entry: Any) -> list[dict[str, Any]]:
        asked.append((path.suffix, path.exists(), entry.threads))
        made["first"] = made["macs"]
        return [{"latency_ms": {"p50": made["macs"] / 1e5}}]

    def ratio(device: Any, first: Any, second: Any, entry: Any) -> float:
        asked.append((second.suffix, first.exists() and first != second, entry.threads))
        return made["macs"] / made["first"]

    monkeypatch.setattr(trial.Quantize, "__call__", noting)
    monkeypatch.setattr(exporting, "profiles", profiles)
    monkeypatch.setattr(trial, "ratio", ratio)
    step = PruneToBudget(target="tflite-int8", latency_ms=3.0, threads=2, round_to=1)
    result = step(start, Data(calibration=Noise()))
    macs = count_macs(result.module, (torch.zeros(1, 1, 8, 8),))
    assert 2.85e5 <= macs <= 3.0e5
    assert set(asked) == {(".tflite", True, 2)} and len(asked) > 1


def test_a_ratio_is_of_the_undisturbed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of ten runs of the second file were disturbed, so that its median is three times too high."""
    samples = {"a": [4.0] * 10, "b": [2.0] * 4 + [6.0] * 6}

    def load(kind: str, name: str) -> Any:
        sides = {s: {"latency_ms": {"samples": v}} for s, v in samples.items()}
        return dict if name == "settings" else lambda *_: sides

    monkeypatch.setattr(trial.registry, "load", load)
    assert trial.ratio(None, Path("a"), Path("b"), ProfileEntry()) == 0.5


def test_a_model_that_fits_is_left_alone() -> None:
    start = candidate()
    result = PruneToBudget(target="tflite-fp32", size_bytes=10_000_000)(start, Data())
    assert result.module is start.module


def test_errors() -> None:
    with pytest.raises(RecipeError, match="expected one of the two"):
        PruneToBudget()
    with pytest.raises(RecipeError, match="must be positive"):
        PruneToBudget(size_bytes=-3)
    with pytest.raises(ModelError, match="no pruned model fits the budget of 100"):
        PruneToBudget(target="tflite-fp32", size_bytes=100, attempts=2)(candidate(), Data())
