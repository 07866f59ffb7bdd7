"""Two gloo processes on this machine train as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """\
import json, sys
from collections.abc import Iterator
import numpy as np, torch
from torch import nn
from edgecomp.compress import fit, parallel
from edgecomp.compress.train import Finetune
from edgecomp.spec import Batch, Candidate, Data, TensorSpec

class Points:
    labels, preprocessing = (), None
    def __len__(self): return 100
    def batches(self, size, *, shuffle_seed=None):
        rng = np.random.default_rng(0)
        targets = np.arange(100) % 3
        inputs = (rng.normal(size=(100, 8)) + np.eye(3, 8)[targets]).astype(np.float32)
        order = np.arange(100)
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(100)
        for start in range(0, 100, size):
            yield Batch((inputs[order[start:start + size]],), targets[order[start:start + size]])

losses = []
epoch = fit._epoch
fit._epoch = lambda *a: losses.append(epoch(*a)) or losses[-1]
torch.manual_seed(0)
module = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
step = Finetune(epochs=4, batch_size=7, learning_rate=0.01, optimizer="sgd")
result = step(Candidate(module, (TensorSpec("x", (1, 8)),)), Data(train=Points()))
weights = [float(p.detach().double().sum()) for p in result.module.parameters()]
if parallel.rank() == 0:
    open(sys.argv[1], "w").write(json.dumps({"losses": losses, "weights": weights, "size": parallel.size()}))
"""


def run(folder: Path, name: str, *launcher: str) -> dict[str, list[float]]:
    (folder / "script.py").write_text(SCRIPT)
    words = [sys.executable, *launcher, str(folder / "script.py"), str(folder / name)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[float]] = json.loads((folder / name).read_text())
    return found


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    alone = run(tmp_path, "alone.json")
    together = run(tmp_path, "two.json", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert (alone["size"], together["size"]) == (1, 2)
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert together["weights"] == pytest.approx(alone["weights"], rel=1e-3, abs=1e-4)
