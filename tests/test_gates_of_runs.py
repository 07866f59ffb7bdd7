"""Gates of recipes: what may be written, and figures of a device judged after a step and on an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecomp import pipeline_export, recipe, trial
from edgecomp.errors import RecipeError
from edgecomp.parity import gates

NET = """\
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
"""
RECIPE = """\
model: net.py:build
data: {train: train.npz, calibration: train.npz, evaluation: train.npz}
steps:
  - prune: {sparsity: 0.5}
    gates: ["latency_p50 < 2ms on local", max_drop: 0.9]
    on_failure: rollback
  - quantize: {samples: 16}
exports: [tflite-int8]
gates: {max_drop: 0.5, tflite-int8: ["latency < 3ms on local", "size < 9kB"]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    inputs = (rng.normal(size=(60, 6)) + 2 * np.eye(3, 6)[labels]).astype(np.float32)
    np.savez(tmp_path / "train.npz", x=inputs, y=labels)
    return tmp_path


class Slow:
    """Stands for the profiler: so many milliseconds, whatever the file; None when the device is lost."""

    def __init__(self, p50: float | None) -> None:
        self.p50, self.files = p50, []  # type: ignore[var-annotated]

    def __call__(self, path: Path, devices: Any, entry: Any) -> list[dict[str, Any]]:
        self.files.append(path.name)
        latency = None if self.p50 is None else {"p50": self.p50}
        return [{"device": {"name": d.name}, "latency_ms": latency, "warnings": []} for d in devices]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, p50: float | None) -> tuple[dict[str, Any], Slow]:
    from edgecomp import pipeline

    slow = Slow(p50)
    monkeypatch.setattr(pipeline_export, "profiles", slow)
    return pipeline.run(recipe.read(folder / "recipe.yaml"), folder / "out"), slow


def test_fast_enough_passes_after_the_step_and_on_the_artifact(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, slow = run(folder, monkeypatch, 1.5)
    told = {g["expr"]: (g["value"], g["passed"]) for g in facts["steps"][1]["gates"]}
    assert told["latency_p50 < 2ms on local"] == (1.5, True) and told["drop <= 0.9"][1]
    artifact = facts["artifacts"][0]
    assert [(g["expr"], g["value"]) for g in artifact["gates"]] == [("latency < 3ms on local", 1.5)]
    assert {g["expr"] for g in artifact["parity"]["gates"]} == {"drop <= 0.5", "size < 9kB"}
    assert facts["verdict"] == {"passed": True, "text": "All 5 gates hold."}
    assert slow.files == ["tflite-int8.tflite"] * 2
    assert "latency &lt; 3ms on local" in (folder / "out" / "report.html").read_text()


def test_too_slow_is_rolled_back_and_an_artifact_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, _ = run(folder, monkeypatch, 4.0)
    pruned, quantized = facts["steps"][1:]
    assert pruned["rolled_back"] and quantized["params"] >= facts["steps"][0]["params"]
    assert (
        not facts["verdict"]["passed"] and "latency_p50 is 4; the gate asks < 3" in facts["verdict"]["text"]
    )


def test_what_was_not_measured_does_not_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, _ = run(folder, monkeypatch, None)
    assert facts["steps"][1]["rolled_back"] and not facts["verdict"]["passed"]
    assert "latency_p50 was not measured on local" in facts["verdict"]["text"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("< 3ms on local", "< 3ms on pi5", "needs a profile on pi5; the recipe profiles on local"),
        ("exports: [tflite-int8]", "exports: []", "exports none"),
        ("max_drop: 0.5,", "max_drop: often,", "gates"),
        ("size < 9kB", "size < 9kB on local", "size is no figure of a profile"),
        ("size < 9kB", "latencies < 9", "did you mean"),
        ("gates: {max", "profile: null\ngates: {max", "the recipe profiles on none"),
    ],
)
def test_gates_that_cannot_be_judged_are_refused(folder: Path, old: str, new: str, says: str) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace(old, new))
    with pytest.raises(RecipeError, match=says):
        recipe.read(folder / "recipe.yaml")


def test_units_and_short_names_by_hand() -> None:
    gate = gates.parse("latency_p90 <= 250 us on pi5")
    assert (gate.name, gate.bound, gate.device, gate.profiled) == ("latency_p90", 0.25, "pi5", True)
    assert gates.parse("size<2MB").name == "size_bytes" and gates.parse("latency < 1").name == "latency_p50"
    profile = {"device": {"name": "a"}, "latency_ms": {"p90": 0.2}, "peak_rss_bytes": 5}
    (found,) = trial.judge([gates.parse("peak_rss_bytes < 4B")], [profile])
    assert (found["value"], found["passed"]) == (5.0, False)


def test_a_drop_of_a_share_needs_as_many_samples_as_a_delta() -> None:
    facts = {"drop": 0.0, "samples": 100, "shares": ["drop"]}
    assert "381 are needed" in gates.parse("drop <= 0.01").check(facts)["reason"]
    assert gates.parse("drop <= 0.01").check({**facts, "samples": 381})["passed"]


def test_the_schema_for_editors_knows_max_drop() -> None:
    schema = recipe.json_schema()
    assert '"const": "max_drop"' in json.dumps(schema["$defs"])
    by_target = [c for c in schema["properties"]["gates"]["anyOf"] if "properties" in c]
    assert [c["properties"] for c in by_target] == [{"max_drop": {"type": "number"}}]
