"""An exporter of somebody else's package is found by its entry point and used as the built-in ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

PLUGIN = Path(__file__).parent / "plugin_example"


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PLUGIN)}
    return subprocess.run(
        [sys.executable, "-m", "edgecomp", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def model(folder: Path) -> None:
    (folder / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def linear():\n    torch.manual_seed(0)\n    return nn.Linear(6, 3)\n"
        "def deep():\n    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))\n"
    )
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=rng.normal(size=(40, 6)).astype(np.float32), y=np.arange(40) % 3)


def test_export_uses_it_checks_parity_and_takes_its_settings(tmp_path: Path) -> None:
    model(tmp_path)
    words = ("export", "net.py:linear", "--target", "npz-linear", "--data", "data.npz", "--out", "out")
    done = call(tmp_path, *words, "--json", "-", "--gate", "sqnr_db > 100")
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(done.stdout)["artifacts"]
    assert entry["manifest"]["target"] == "npz-linear" and entry["manifest"]["golden"]
    assert entry["parity"]["top1_agreement"] == 1.0 and entry["parity"]["runtime"].startswith("numpy")
    failed = call(tmp_path, *words, "--gate", "sqnr_db > 100", "--set", "npz-linear.gain=1.5")
    assert failed.returncode == 1 and "sqnr_db is 6.0" in failed.stderr
    unknown = call(tmp_path, *words, "--set", "npz-linear.gane=2")
    assert unknown.returncode == 2 and "did you mean 'gain'?" in unknown.stderr


def test_its_problems_stop_the_export_before_any_work(tmp_path: Path) -> None:
    model(tmp_path)
    done = call(
        tmp_path, "export", "net.py:deep", "--target", "npz-linear", "--data", "data.npz", "--out", "o"
    )
    assert done.returncode == 2
    assert "target 'npz-linear' cannot express the model: Tanh" in done.stderr
    assert not list((tmp_path / "o").glob("*"))


def test_targets_lists_it(tmp_path: Path) -> None:
    assert "npz-linear" in call(tmp_path, "targets").stdout
