"""An environment with runtimes of 2023 and 2024, made once and kept in the user's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("numpy<2", "tflite-runtime==2.14.0", "onnxruntime==1.17.3")


@pytest.fixture(scope="session")
def old_python() -> Path:
    """Python of the environment; skips with the reason where it cannot be made."""
    if sys.version_info[:2] > (3, 11):
        pytest.skip("tflite-runtime 2.14 has wheels up to Python 3.11")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "edgecomp" / "old-runtimes"
    python = folder / "bin" / "python"
    if not _works(python):
        _make(folder, python)
    return python


def _works(python: Path) -> bool:
    code = "import numpy, onnxruntime, tflite_runtime; assert onnxruntime.__version__ == '1.17.3'"
    return python.exists() and subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def _make(folder: Path, python: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
    command = [str(python), "-m", "pip", "install", "--quiet", *PACKAGES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired:
        last = "pip took more than ten minutes"
    if not _works(python):
        pytest.skip(f"old runtimes cannot be installed here: {last}")
