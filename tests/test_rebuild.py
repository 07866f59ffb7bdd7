"""The same recipe gives the same bytes, in other processes and with other numbers of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgecomp import registry
from edgecomp.cli import main
from edgecomp.errors import InputError
from edgecomp.rebuild import changed, earlier

NET = """\
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(32, 3))
"""
RECIPE = """\
model: net.py:build
data:
  calibration: data.npz
  evaluation: data.npz
  train: data.npz
steps:
  - finetune: {epochs: 1, batch_size: 16, learning_rate: 0.01}
  - quantize: {samples: 16}
exports: [tflite-int8, onnx-qdq, coreml-pal4]
profile: null
parity: false
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rebuild")
    (path / "net.py").write_text(NET)
    (path / "recipe.yaml").write_text(RECIPE)
    rng = np.random.default_rng(0)
    np.savez(path / "data.npz", x=rng.normal(size=(48, 1, 8, 8)).astype(np.float32), y=np.arange(48) % 3)
    done = command(path, "1", "run", "recipe.yaml", "--out", "out")
    assert done.returncode == 0, done.stderr
    return path


def command(folder: Path, threads: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgecomp", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
    )


@pytest.mark.slow
def test_the_same_bytes_in_another_process_with_other_threads(folder: Path) -> None:
    done = command(folder, "2", "rebuild", "--check", "out", "--json", "-")
    facts = json.loads(done.stdout)
    assert done.returncode == 0, facts
    assert len(facts["artifacts"]) == 3 and all(a["same"] for a in facts["artifacts"])
    assert facts["environment"] == ["threads: 1 -> 2"]


WIDE = """\
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(128, 64), nn.Hardswish(), nn.Linear(64, 4))
"""


def hashes(folder: Path, threads: str, targets: list[str]) -> dict[str, str]:
    """SHA-256 of every target, exported in a process of its own."""
    out = f"out-{threads}-{len(list(folder.glob('out-*')))}"
    words = ["export", "net.py:build", "--calib", "data.npz", "--no-parity", "--out", out, "--json", "-"]
    done = command(folder, threads, *words, *[word for t in targets for word in ("--target", t)])
    assert done.returncode == 0, done.stderr
    return {a["manifest"]["target"]: a["manifest"]["sha256"] for a in json.loads(done.stdout)["artifacts"]}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_builds_of_each_target_have_one_hash(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(WIDE)
    x = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    targets = [t for t in registry.names("exporters") if registry.entry("exporters", t).extra]
    assert len(targets) >= 15
    built = [hashes(tmp_path, threads, targets) for threads in ("1", "2", "3", "4", "1")]
    different = {t: {b[t] for b in built} for t in targets if len({b[t] for b in built}) > 1}
    assert built[0].keys() == set(targets) and different == {}


def test_another_model_is_noticed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    plain = "model: net.py:build\ndata: {evaluation: data.npz}\nexports: [tflite-fp32]\n"
    plain += "parity: false\nprofile: null\n"
    (tmp_path / "recipe.yaml").write_text(plain)
    (tmp_path / "data.npz").write_bytes((folder / "data.npz").read_bytes())
    assert CliRunner().invoke(main, ["run", "recipe.yaml", "--out", "out"]).exit_code == 0
    same = CliRunner().invoke(main, ["rebuild", "--check", "out"])
    assert same.exit_code == 0 and "same" in same.stdout
    (tmp_path / "other.py").write_text(NET.replace("manual_seed(0)", "manual_seed(1)"))
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    ledger["recipe"]["model"] = "other.py:build"
    (tmp_path / "out" / "ledger.json").write_text(json.dumps(ledger))
    other = CliRunner().invoke(main, ["rebuild", "--check", "out"])
    assert other.exit_code == 1
    assert "DIFFERENT" in other.stdout and "did not come out the same" in other.stderr


def test_what_cannot_be_rebuilt(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["rebuild", "--check", str(tmp_path)])
    assert result.exit_code == 2 and "give the folder of a finished run" in result.stderr
    (tmp_path / "ledger.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        earlier(tmp_path)
    (tmp_path / "ledger.json").write_text('{"artifacts": []}')
    with pytest.raises(InputError, match="nothing to rebuild"):
        earlier(tmp_path)


def test_what_changed_since() -> None:
    then = {
        "python": "3.11.1",
        "machine": "x86_64",
        "cpu": "a",
        "threads": None,
        "versions": {"torch": "2.9"},
    }
    now = {
        "python": "3.11.2",
        "machine": "x86_64",
        "cpu": "a",
        "threads": None,
        "versions": {"torch": "2.13"},
    }
    assert changed(then, now) == ["python: 3.11.1 -> 3.11.2", "torch: 2.9 -> 2.13"]
    assert changed(then, then) == []
