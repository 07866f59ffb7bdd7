"""SIGKILL inside each training step of a run: resumed, it ends with a whole run's ledger and weights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

NET = """\
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
                         nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3))
"""
RECIPE = """\
model: net.py:build
data: {train: train.npz, calibration: train.npz, evaluation: test.npz}
steps:
  - prune-iterative: {macs: 0.6, rounds: 2, epochs: 2, final_epochs: 2, batch_size: 16, learning_rate: 0.01}
  - prune-movement: {sparsity: 0.5, epochs: 2, batch_size: 16, learning_rate: 0.01}
  - distill: {epochs: 3, batch_size: 16, accumulate: 2, layers: ["3"], shift: 1, learning_rate: 0.01}
  - qat: {epochs: 3, batch_size: 16}
profile: null
"""
# Runs the recipe, and kills its own process once a training has written its state so many times.
DRIVER = """\
import os, signal, sys
from pathlib import Path
from edgecomp import pipeline
from edgecomp.compress import interim
from edgecomp.compress.interim import Keeper
from edgecomp.recipe import read
writes, resume = int(sys.argv[1]), sys.argv[2] == "resume"
write = Keeper._write
def killing(self, place, notes):
    global writes
    write(self, place, notes)
    writes -= 1
    if writes == 0:
        os.kill(os.getpid(), signal.SIGKILL)
Keeper._write, interim._SHARE = killing, 1e9
pipeline.run(read(Path("recipe.yaml")), Path(sys.argv[3]), resume=resume, save_every=0.0)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("test", 30)):
        labels = np.arange(count) % 3
        pictures = rng.normal(size=(count, 1, 8, 8)).astype(np.float32) * 0.3
        pictures[np.arange(count), 0, labels * 2] += 2.0
        np.savez(tmp_path / f"{name}.npz", x=pictures, y=labels)
    return tmp_path


def driven(folder: Path, writes: int, how: str, out: str) -> int:
    words = [sys.executable, "-c", DRIVER, str(writes), how, out]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def told(folder: Path) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = json.loads((folder / "ledger.json").read_text())["steps"]
    keys = ("name", "metrics", "notes", "params", "nonzero_params", "macs")
    return [{k: s[k] for k in keys} for s in steps]


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for each in value.values() for t in tensors(each)]
    return [t for each in value for t in tensors(each)] if isinstance(value, list | tuple) else []


@pytest.mark.slow
def test_killed_in_every_step_and_resumed_a_run_ends_as_a_whole_one(folder: Path) -> None:
    assert driven(folder, 0, "new", "whole") == 0
    killed_in, how = [], "new"
    for writes in (12, 10, 8, 9):
        if driven(folder, writes, how, "out") == 0:
            break
        killed_in.append(next((folder / "out" / "checkpoints").glob("*.training")).name)
        how = "resume"
    else:
        assert driven(folder, 0, how, "out") == 0
    assert {name[3:-9] for name in killed_in} == {"prune-iterative", "prune-movement", "distill", "qat"}
    assert told(folder / "out") == told(folder / "whole")
    for path in sorted((folder / "whole" / "checkpoints").glob("*.pt")):
        first = torch.load(path, weights_only=True)
        second = torch.load(folder / "out" / "checkpoints" / path.name, weights_only=True)
        pairs = list(zip(tensors(first), tensors(second), strict=True))
        assert len(pairs) > 5 and all(torch.equal(a, b) for a, b in pairs), path.name
    assert not list((folder / "out" / "checkpoints").glob("*.training"))
