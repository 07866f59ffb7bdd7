"""INT8 files run on tflite-runtime 2.14 (2023) and ONNX Runtime 1.17 (2024), and give what new ones give."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "exporters"))

import tflite_functions as functions
from mixed_plans import mixed
from tflite_support import Many, quantized

from edgecomp import door
from edgecomp.exporters.onnx import OnnxExporter
from edgecomp.exporters.tflite import TFLiteExporter
from edgecomp.runtimes.litert import LiteRTRuntime
from edgecomp.runtimes.onnxruntime import OnnxRuntime
from edgecomp.spec import Candidate, Data, TensorSpec

pytestmark = pytest.mark.slow
RUN = Path(__file__).parent / "run_old.py"
# tflite-runtime 2.14 divides floats only.
DIVISIONS = {"divided by a number", "quotient"}
NO_LOWERING = {"adaptive max", "largest, by position", "two indices"}
"""Functions that are not exported to ONNX."""

FAMILIES: dict[str, tuple[dict[str, Callable[..., Any]], torch.Tensor]] = {
    "convolutions": (functions.CONVOLUTIONS, functions.PICTURE),
    "networks": (functions.NETWORKS, functions.PICTURE),
    "pools": (functions.POOLS, functions.PICTURE),
    "activations": (functions.ACTIVATIONS, functions.PICTURE),
    "arithmetic": (functions.ARITHMETIC, functions.PICTURE),
    "reductions": (functions.REDUCTIONS, functions.PICTURE),
    "moves": (functions.MOVES, functions.PICTURE),
    "positive": (functions.POSITIVE_ONLY, functions.POSITIVE),
    "sequences": (functions.SEQUENCES, functions.SEQUENCE),
}


def made(family: str, without: set[str] = DIVISIONS) -> tuple[list[str], Candidate, torch.Tensor]:
    picked, x = FAMILIES[family]
    kept = {k: f for k, f in picked.items() if k not in without}
    return list(kept), quantized(Many(kept), x), x


def run_old(python: Path, path: Path, arrays: list[np.ndarray], folder: Path) -> list[np.ndarray]:
    """In the old environment. Fails with the runtime's own last words."""
    given, wanted = folder / "given.npz", folder / "wanted.npz"
    np.savez(given, **{f"x{i}": a for i, a in enumerate(arrays)})
    done = subprocess.run([python, RUN, path, given, wanted], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-3:]
    with np.load(wanted) as stored:
        return [stored[f"y{i}"] for i in range(len(stored))]


def steps_apart(new: np.ndarray, old: np.ndarray, spec: TensorSpec) -> float:
    if spec.scale is not None:
        return float(np.abs(new.astype(np.int64) - old.astype(np.int64)).max(initial=0))
    return float(not np.allclose(new, old, rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("family", FAMILIES)
def test_tflite_int8_on_tflite_runtime_2_14(family: str, old_python: Path, tmp_path: Path) -> None:
    names, candidate, x = made(family)
    path = tmp_path / "m.tflite"
    TFLiteExporter().export(candidate, Data(), path)
    session = LiteRTRuntime().open(path)
    stored = [door.into(x.numpy(), session.inputs[0])]
    old = run_old(old_python, path, stored, tmp_path)
    for name, a, b, spec in zip(names, session.run(stored), old, session.outputs, strict=True):
        assert steps_apart(a, b, spec) <= 1, name


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_qdq_on_onnx_runtime_1_17(family: str, old_python: Path, tmp_path: Path) -> None:
    """Sums of floats may round otherwise: a value half way between two steps, and what follows from it."""
    names, candidate, x = made(family, NO_LOWERING)
    path = tmp_path / "m.onnx"
    OnnxExporter().export(candidate, Data(), path)
    new = OnnxRuntime().open(path, optimize=False).run([x.numpy()])
    for name, a, b in zip(names, new, run_old(old_python, path, [x.numpy()], tmp_path), strict=True):
        if a.dtype.kind != "f":
            np.testing.assert_array_equal(a, b, err_msg=name)
            continue
        spread = max(float(a.max() - a.min()), 1e-6) / 255
        off = np.abs(a - b) / spread
        assert off.max(initial=0) <= 2.5 and (off > 0.5).mean() <= 0.02, name


def test_mixed_widths_need_a_newer_tflite_runtime(old_python: Path, tmp_path: Path) -> None:
    """QUANTIZE from int8 to int16 came later; the file is refused, not miscomputed."""
    _, candidate, x = made("networks")
    path = tmp_path / "m.tflite"
    TFLiteExporter().export(mixed(candidate, lambda n: n % 2 == 0), Data(), path)
    stored = [door.into(x.numpy(), LiteRTRuntime().open(path).inputs[0])]
    with pytest.raises(AssertionError, match="QUANTIZE. failed to prepare"):
        run_old(old_python, path, stored, tmp_path)
