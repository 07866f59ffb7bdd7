"""`edgecomp distill` for embeddings and for text, with a teacher named on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgecomp import checkpoint
from edgecomp.cli import main

NETS = """\
import torch
from torch import nn
def embedder():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
def taught():
    torch.manual_seed(1)
    return embedder()
def student():
    torch.manual_seed(2)
    return embedder()
def language():
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)).eval()
def writer():
    torch.manual_seed(3)
    return language()
def reader():
    torch.manual_seed(4)
    return language()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "points.npz", x=rng.normal(size=(64, 6)).astype(np.float32))
    np.savez(tmp_path / "tokens.npz", x=rng.integers(0, 11, (32, 12)))
    return tmp_path


@pytest.mark.parametrize(
    ("model", "teacher", "words", "step"),
    [
        ("student", "taught", ("points.npz", "--set", "loss=cosine", "--set", "alpha=1"), "distill"),
        ("reader", "writer", ("tokens.npz", "--kind", "text", "--set", "prompt=2"), "distill-text"),
    ],
)  # fmt: skip
def test_a_student_without_labels(
    folder: Path, model: str, teacher: str, words: tuple[str, ...], step: str
) -> None:
    done = CliRunner().invoke(main, [
        "distill", f"nets.py:{model}", "--teacher", f"nets.py:{teacher}", "--train", *words, "--epochs", "3",
        "--set", "learning_rate=0.01", "--set", "batch_size=16", "--out", "s.pt", "--json", "-",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["step"] == step and facts["settings"]["epochs"] == 3
    candidate, _ = checkpoint.load(folder / "s.pt")
    assert candidate.history[-1].name == step
