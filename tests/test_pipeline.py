"""The whole chain on a tiny model: resume, gates, rollback, interruption, bad input found before work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from edgecomp import checkpoint, files, pipeline
from edgecomp.cli import main
from edgecomp.compress.train import Finetune
from edgecomp.errors import EdgecompError
from edgecomp.recipe import read

NET = """\
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3))
def odd():
    return nn.Sequential(nn.Conv2d(1, 4, 3), Sorting(), nn.Flatten(), nn.Linear(96, 3))
class Sorting(nn.Module):
    def forward(self, x):
        return torch.fft.rfft2(x).abs()[..., :6].contiguous()
def broken():
    model = build()
    model[0].weight.data[0, 0, 0, 0] = float("nan")
    return model
def dictionary():
    return {"weight": 3}
def failing():
    raise RuntimeError("no weights here")
"""
RECIPE = """\
model: net.py:build
data:
  train: train.npz
  calibration: train.npz
  evaluation: test.npz
steps:
  - prune: {sparsity: 0.5}
  - finetune: {epochs: 2, batch_size: 16, learning_rate: 0.01}
  - quantize: {samples: 16}
exports: [tflite-int8, tflite-fp32]
gates: ["sqnr_db > -30"]
profile: null
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("test", 30)):
        labels = np.arange(count) % 3
        pictures = rng.normal(size=(count, 1, 8, 8)).astype(np.float32) * 0.3
        pictures[np.arange(count), 0, labels * 2] += 2.0
        np.savez(tmp_path / f"{name}.npz", x=pictures, y=labels)
    return tmp_path


def call(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def steps(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "ledger.json").read_text())["steps"]
    return found


def test_a_run_leaves_artifacts_ledger_report_and_checkpoints(folder: Path) -> None:
    done = call("run", "recipe.yaml", "--out", "out", "--json", "-")
    assert done.exit_code == 0, done.output
    ledger = json.loads((folder / "out" / "ledger.json").read_text())
    assert [s["name"] for s in ledger["steps"]] == ["float", "prune", "finetune", "quantize"]
    start, pruned, tuned, quantized = ledger["steps"]
    assert start["params"] == 16 * 9 + 16 + 32 + 16 * 16 * 9 + 16 + 64 * 3 + 3
    assert start["macs"] == 9 * 16 * 64 + 9 * 256 * 36 + 192
    assert pruned["params"] == 8 * 9 + 8 + 16 + 8 * 8 * 9 + 8 + 32 * 3 + 3
    assert quantized["size_bytes"] < tuned["size_bytes"] / 2
    expected = tuned["metrics"]["accuracy"] - pruned["metrics"]["accuracy"]
    assert tuned["delta_vs_previous"]["accuracy"] == pytest.approx(expected)
    assert all(s["seconds"] > 0 and s["peak_rss_bytes"] > 1e6 for s in ledger["steps"])
    assert ledger["verdict"] == {"passed": True, "text": "All 2 gates hold."}
    for entry in ledger["artifacts"]:
        path = folder / "out" / entry["path"]
        assert files.sha256(path) == entry["manifest"]["sha256"]
        assert (path.parent / entry["manifest"]["golden"]).exists()
        assert entry["manifest"]["recipe_sha256"] == ledger["recipe_sha256"]
        assert entry["parity"]["samples"] == 30
    layers = ledger["artifacts"][0]["parity"]["layers"]
    assert layers and all(row["sqnr_db"] > 5 for row in layers)
    assert "tflite-int8" in (folder / "out" / "report.html").read_text()
    candidate, _ = checkpoint.load(folder / "out" / "checkpoints" / "01-prune.pt")
    assert candidate.module[0].out_channels == 8


def test_resume_goes_on_after_the_last_finished_step_and_ends_with_the_same_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("run", "recipe.yaml", "--out", "whole").exit_code == 0
    original = Finetune.__call__

    def interrupted(self: Finetune, *arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Finetune, "__call__", interrupted)
    stopped = call("run", "recipe.yaml", "--out", "out")
    assert stopped.exit_code == 130
    assert [s["name"] for s in steps(folder / "out")] == ["float", "prune"]
    assert not list((folder / "out").glob("*.tflite")) and not list((folder / "out").rglob(".*partial*"))
    monkeypatch.setattr(Finetune, "__call__", original)
    assert call("run", "recipe.yaml", "--out", "out", "--resume").exit_code == 0
    whole, resumed = steps(folder / "whole"), steps(folder / "out")
    assert [s["metrics"] for s in whole] == [s["metrics"] for s in resumed]
    assert files.sha256(folder / "out/tflite-int8.tflite") == files.sha256(
        folder / "whole/tflite-int8.tflite"
    )
    again = pipeline.run(read(folder / "recipe.yaml"), folder / "out", resume=True)
    assert again["steps"] == resumed


def test_resume_refuses_another_recipe_and_an_empty_folder(folder: Path) -> None:
    missing = call("run", "recipe.yaml", "--out", "out", "--resume")
    assert missing.exit_code == 2 and "nothing to resume" in missing.stderr
    (folder / "recipe.yaml").write_text(RECIPE.replace("exports: [tflite-int8, tflite-fp32]", "exports: []"))
    assert call("run", "recipe.yaml", "--out", "out").exit_code == 0
    (folder / "recipe.yaml").write_text(RECIPE)
    other = call("run", "recipe.yaml", "--out", "out", "--resume")
    assert other.exit_code == 2 and "another version of the recipe" in other.stderr


def test_a_step_that_breaks_its_gate_stops_or_is_rolled_back(folder: Path) -> None:
    gated = RECIPE.replace("exports: [tflite-int8, tflite-fp32]", "exports: []").replace(
        "  - prune: {sparsity: 0.5}\n", "  - prune: {sparsity: 0.5}\n    gates: ['params < 10']\n"
    )
    (folder / "recipe.yaml").write_text(gated)
    stopped = call("run", "recipe.yaml", "--out", "out")
    assert stopped.exit_code == 1 and "step 'prune' did not pass its gate 'params < 10'" in stopped.stderr
    assert steps(folder / "out")[-1]["passed"] is False and (folder / "out" / "report.html").exists()
    (folder / "recipe.yaml").write_text(gated.replace("10']\n", "10']\n    on_failure: rollback\n"))
    assert call("run", "recipe.yaml", "--out", "out").exit_code == 0
    rows = steps(folder / "out")
    assert rows[1]["rolled_back"] and rows[2]["params"] == rows[0]["params"]


def test_a_failed_gate_of_an_artifact_is_exit_code_1(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("sqnr_db > -30", "size_bytes < 10"))
    done = call("run", "recipe.yaml", "--out", "out")
    assert done.exit_code == 1 and "2 of 2 gates failed" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "code", "says"),
    [
        ("net.py:build", "net.py:bild", 2, "did you mean 'build'?"),
        ("net.py:build", "nets.py:build", 2, "no file at nets.py"),
        ("net.py:build", "net.py:broken", 2, "weight '0.weight' holds 1 values that are NaN or Inf"),
        ("net.py:build", "net.py:dictionary", 2, "gives a dict; expected a torch.nn.Module"),
        ("net.py:build", "net.py:failing", 2, "RuntimeError: no weights here"),
        ("net.py:build", "net.py:odd", 2, "cannot express the model"),
        ("model: net.py:build", "model: net.py:build\nweights: no.pt", 2, "no checkpoint at no.pt"),
        ("model: net.py:build", "model: net.py:build\nweights: test.npz", 2, "not a checkpoint of tensors"),
        ("evaluation: test.npz", "evaluation: nowhere", 2, "data.evaluation: data 'nowhere' does not exist"),
        ("evaluation: test.npz", "evaluation: wide.npz", 2, "does not run on inputs of shape"),
        ("calibration: train.npz", "calibration: nan.npz", 2, "NaN or Inf"),
        ("tflite-int8,", "tflite-int7,", 2, "did you mean 'tflite-int8'?"),
        ("  - quantize: {samples: 16}\n", "", 2, "no step of the recipe quantizes"),
    ],
)
def test_bad_input_is_found_before_any_step(folder: Path, old: str, new: str, code: int, says: str) -> None:
    np.savez(folder / "wide.npz", x=np.zeros((4, 2, 8, 8), np.float32), y=np.zeros(4, np.int64))
    np.savez(folder / "nan.npz", x=np.full((4, 1, 8, 8), np.nan, np.float32), y=np.zeros(4, np.int64))
    (folder / "recipe.yaml").write_text(RECIPE.replace(old, new, 1))
    done = call("run", "recipe.yaml", "--out", "out")
    assert done.exit_code == code, done.output
    assert says in done.stderr and done.stderr.count("\n\n") == 0
    assert not (folder / "out" / "ledger.json").exists()


def test_a_file_instead_of_a_folder_is_refused(folder: Path) -> None:
    (folder / "out").write_text("a file")
    done = call("run", "recipe.yaml", "--out", "out")
    assert done.exit_code == 2 and "cannot write" in done.stderr
    assert (folder / "out").read_text() == "a file"


def test_a_checkpoint_with_python_objects_is_never_executed(folder: Path) -> None:
    marker = folder / "ran"

    class Danger:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(marker),)

    torch.save({"state_dict": Danger()}, folder / "danger.pt")
    done = call("prune", "net.py:build", "--weights", "danger.pt", "--sparsity", "0.5", "--data", "test.npz",
                "--out", "p.pt")  # fmt: skip
    assert done.exit_code == 2 and "never executed" in done.stderr
    assert not marker.exists() and not (folder / "p.pt").exists()


def test_single_steps_chain_through_checkpoints(folder: Path) -> None:
    common = ("--data", "test.npz", "--json", "-", "--out")
    assert call("prune", "net.py:build", "--sparsity", "0.5", *common, "a.pt").exit_code == 0
    distilled = call("distill", "a.pt", "--train", "train.npz", "--epochs", "1", *common, "b.pt")
    assert distilled.exit_code == 0, distilled.output
    quantized = call("quantize", "b.pt", "--calib", "train.npz", "--samples", "8", *common, "c.pt")
    assert quantized.exit_code == 0, quantized.output
    facts = json.loads(quantized.stdout)
    assert facts["after"]["size_bytes"] < facts["before"]["size_bytes"] / 2
    words = ("--target", "tflite-int8", "--data", "test.npz", "--out", "out", "--json", "-")
    exported = call("export", "c.pt", *words)
    assert exported.exit_code == 0, exported.output
    history = json.loads(exported.stdout)["artifacts"][0]["manifest"]["history"]
    assert [h["name"] for h in history][:3] == ["prune", "distill", "quantize"]


def test_a_quantized_checkpoint_gives_the_same_file(folder: Path) -> None:
    words = ("--target", "tflite-int8", "--data", "test.npz", "--no-parity", "--out")
    assert call("export", "net.py:build", "--calib", "train.npz", *words, "direct").exit_code == 0
    assert call("quantize", "net.py:build", "--calib", "train.npz", "--out", "q.pt").exit_code == 0
    assert call("export", "q.pt", *words, "by-checkpoint").exit_code == 0
    one, two = (folder / n / "tflite-int8.tflite" for n in ("direct", "by-checkpoint"))
    assert files.sha256(one) == files.sha256(two)


def test_export_says_what_it_lacks(folder: Path) -> None:
    bare = call("export", "net.py:build", "--target", "tflite-fp32", "--out", "out")
    assert bare.exit_code == 2 and "--input-shape" in bare.stderr
    words = ("--input-shape", "1,1,8,8", "--out", "out")
    assert call("export", "net.py:build", "--target", "tflite-fp32", *words).exit_code == 0
    uncalibrated = call("export", "net.py:build", "--target", "tflite-int8", *words)
    assert uncalibrated.exit_code == 2 and "give --calib SRC" in uncalibrated.stderr


def test_a_killed_run_resumes(folder: Path) -> None:
    """SIGKILL while fine-tuning: nothing half-written, and the resumed run ends as a whole one."""
    slow = RECIPE.replace("epochs: 2", "epochs: 400").replace("[tflite-int8, tflite-fp32]", "[]")
    (folder / "recipe.yaml").write_text(slow)
    words = [sys.executable, "-m", "edgecomp", "run", "recipe.yaml", "--out", "out"]
    process = subprocess.Popen(words, cwd=folder, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    ledger = folder / "out" / "ledger.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (ledger.exists() and len(steps(folder / "out")) == 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [s["name"] for s in steps(folder / "out")] == ["float", "prune"]
    document = read(folder / "recipe.yaml")
    state = pipeline.prepared(document, folder / "out", resume=True)
    assert pipeline._finished(state, document.recipe.steps) == 2
    assert state.candidates.floating.module[0].out_channels == 8


def test_every_error_is_ours(folder: Path) -> None:
    with pytest.raises(EdgecompError):
        pipeline.run(read(folder / "recipe.yaml"), folder / "net.py")


def test_init_writes_a_recipe_that_holds(folder: Path) -> None:
    words = ("--train", "train.npz", "--data", "test.npz", "--out", "made.yaml")
    done = call("init", "net.py:build", *words)
    assert done.exit_code == 0, done.output
    text = (folder / "made.yaml").read_text()
    assert "# The model is convolutional: 2,707 parameters" in text
    found = read(folder / "made.yaml").recipe
    assert [s.name for s in found.steps] == ["quantize"] and found.data.calibration is not None
    again = call("init", "net.py:build", *words)
    assert again.exit_code == 2 and "exists already" in again.stderr


def test_attribution_says_what_each_step_cost(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("[tflite-int8, tflite-fp32]", "[]"))
    done = call("run", "recipe.yaml", "--out", "out", "--attribute", "--json", "-")
    assert done.exit_code == 0, done.output
    ledger = json.loads(done.stdout)
    rows = ledger["attribution"]
    assert [r["step"] for r in rows] == ["prune", "finetune", "quantize"]
    whole = ledger["steps"][-1]["metrics"]["accuracy"]
    assert all(r["cost"] == pytest.approx(r["without"] - whole) for r in rows)
    tuned = ledger["steps"][2]["metrics"]["accuracy"]
    assert rows[2]["without"] == tuned


def test_a_second_run_into_the_same_folder_replaces_the_first(folder: Path) -> None:
    words = ("--target", "tflite-int8", "--data", "test.npz", "--out", "out", "--calib")
    assert call("export", "net.py:build", *words, "train.npz").exit_code == 0
    first = files.sha256(folder / "out" / "tflite-int8.tflite")
    again = call("export", "net.py:build", *words, "test.npz")
    assert again.exit_code == 0, again.output
    assert files.sha256(folder / "out" / "tflite-int8.tflite") != first
    assert call("verify", "out/tflite-int8.tflite").exit_code == 0


@pytest.mark.slow
def test_a_run_under_torchrun_gives_the_metrics_of_one_process(folder: Path) -> None:
    plain = RECIPE.replace("[tflite-int8, tflite-fp32]", "[tflite-int8]").replace(
        "  - prune: {sparsity: 0.5}\n", ""
    )
    (folder / "recipe.yaml").write_text(plain)
    assert call("run", "recipe.yaml", "--out", "one").exit_code == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "edgecomp")
    words = [sys.executable, *launcher, "run", "recipe.yaml", "--out", "two"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = steps(folder / "one"), steps(folder / "two")
    assert [s["name"] for s in one] == [s["name"] for s in two]
    assert (folder / "two" / "tflite-int8.tflite").exists() and done.stdout.count("report:") == 1
