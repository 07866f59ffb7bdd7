"""What is counted of a model after each step, and `edgecomp prune` with each of its kinds."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from edgecomp.cli import main
from edgecomp.compress.magnitude import PruneMagnitude
from edgecomp.compress.ptq import Quantize
from edgecomp.loading import open_data
from edgecomp.pipeline_steps import count
from edgecomp.spec import Candidate, Data, TensorSpec

NET = """\
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(nn.Flatten(), nn.Sequential(*layers), nn.Linear(16, 2))
"""


def sparse(sparsity: float) -> Candidate:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    return PruneMagnitude(sparsity=sparsity)(Candidate(module, (TensorSpec("x", (1, 64)),)), Data())


def test_compressed_bytes_are_those_of_zlib() -> None:
    found = sparse(0.8)
    expected = zlib.compress(b"".join(p.detach().numpy().tobytes() for p in found.module.parameters()))
    counted = count(found)
    assert counted["compressed_bytes"] == len(expected) < 0.4 * counted["size_bytes"]


def test_dense_weights_are_not_compressed() -> None:
    assert count(sparse(0.05))["compressed_bytes"] is None


def test_integers_are_compressed_as_integers(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32))
    data = Data(calibration=open_data(str(tmp_path / "x.npz")))
    before = sparse(0.8)
    after = Quantize(samples=16, rounding="nearest")(before, data)
    counted = count(after)
    assert after.quantization is not None
    weights = after.quantization.weights.values()
    zeros = sum(int((w.values == 0).sum()) for w in weights if w.values is not None)
    assert zeros > 0.79 * 72 * 64
    assert counted["compressed_bytes"] < min(counted["size_bytes"], 0.5 * count(before)["compressed_bytes"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(40, 16)).astype(np.float32), y=np.arange(40) % 2)
    return tmp_path


def prune(kind: str, *words: str) -> Result:
    common = ("--train", "data.npz", "--data", "data.npz", "--out", "p.pt", "--json", "-")
    return CliRunner().invoke(main, ["prune", "net.py:build", "--kind", kind, *common, *words])


@pytest.mark.parametrize(
    ("kind", "step", "words"),
    [
        ("channels", "prune", ("--params", "0.5", "--set", "round_to=1")),
        ("iterative", "prune-iterative", ("--macs", "0.6", "--set", "round_to=1", "--set", "rounds=1",
                                          "--set", "final_epochs=1")),
        ("layers", "drop-layers", ("--set", "count=1")),
        ("magnitude", "prune-magnitude", ("--set", "pattern=2:4")),
        ("movement", "prune-movement", ("--sparsity", "0.5", "--set", "epochs=1")),
    ],
)  # fmt: skip
def test_each_kind_of_pruning_from_the_command_line(
    folder: Path, kind: str, step: str, words: tuple[str, ...]
) -> None:
    done = prune(kind, *words)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["step"] == step and (folder / "p.pt").is_file()
    assert facts["after"]["nonzero_params"] < 0.8 * facts["before"]["nonzero_params"]
    if kind in ("magnitude", "movement"):
        assert facts["after"]["compressed_bytes"] < facts["before"]["size_bytes"]


def test_a_kind_says_which_settings_it_has(folder: Path) -> None:
    done = prune("layers", "--sparsity", "0.5")
    assert done.exit_code == 2 and "sparsity" in done.stderr and "count" in done.stderr
