from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgecomp.cli import main

NET = """\
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
"""
RECIPE = """\
model: net.py:build
data: {train: data.npz, calibration: data.npz, evaluation: data.npz}
profile: null
steps:
  - prune: {sparsity: 0.5, round_to: 1}
  - finetune: {epochs: 1}
search:
  trials: 4
  space:
    steps.0.sparsity: [0.1, 0.9]
    steps.0.criterion: {choice: [l1, l2]}
    steps.1: optional
  objectives: [metric, size_bytes]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    x = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(30) % 3)
    return tmp_path


def call(*words: str) -> Result:
    return CliRunner().invoke(main, ["search", *words])


def test_trials_vary_what_the_space_names_and_go_on_where_they_stopped(folder: Path) -> None:
    first = call("recipe.yaml", "--out", "out", "--trials", "2", "--json", "-")
    assert first.exit_code == 0, first.output
    done = call("recipe.yaml", "--out", "out", "--json", "-")
    found = json.loads(done.stdout)
    assert [t["number"] for t in found["trials"]] == [0, 1, 2, 3]
    assert found["trials"][:2] == json.loads(first.stdout)["trials"]
    for trial in found["trials"]:
        ledger = json.loads((folder / f"out/trials/{trial['number']:03d}/ledger.json").read_text())
        prune = ledger["steps"][1]
        assert prune["settings"]["sparsity"] == trial["params"]["steps.0.sparsity"]
        assert ("finetune" in [s["name"] for s in ledger["steps"]]) is trial["params"]["steps.1"]
        assert trial["values"]["size_bytes"] == ledger["steps"][-1]["size_bytes"]
    rows = {t["number"]: t["values"] for t in found["trials"]}
    for number in found["pareto"]:
        beaten = [
            r for r in rows.values()
            if r["metric"] >= rows[number]["metric"] and r["size_bytes"] < rows[number]["size_bytes"]
        ]  # fmt: skip
        assert not beaten


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("steps.0.sparsity", "steps.7.sparsity", "names 'steps.7.sparsity'"),
        ("steps.0.sparsity", "sparsity", "names 'sparsity'"),
        ("[metric, size_bytes]", "[metric, latency_ms]", "profile is null"),
        ("[metric, size_bytes]", "[speed]", "'metric', 'size_bytes'"),
        ("search:", "#", "not valid YAML"),
    ],
)
def test_a_space_that_does_not_fit_is_refused(folder: Path, old: str, new: str, says: str) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace(old, new, 1))
    done = call("recipe.yaml", "--out", "out")
    assert done.exit_code == 2 and says in done.stderr, done.output


def test_a_trial_that_fails_is_named_and_the_search_goes_on(folder: Path) -> None:
    bad = RECIPE.replace("[l1, l2]", "[bn_scale]").replace("trials: 4", "trials: 2")
    (folder / "recipe.yaml").write_text(bad)
    done = call("recipe.yaml", "--out", "out", "--json", "-")
    found = json.loads(done.stdout)
    assert all("needs a batch normalization" in t["reason"] for t in found["trials"])
    assert found["pareto"] == [] and len(found["trials"]) == 2
