"""A runtime that needs no backend: artifacts are `.npz` files of a linear layer, quantized at the door."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgecomp import registry
from edgecomp.spec import Batch, TensorSpec


class LinearSession:
    """y = x @ weight.T + bias, int8 in and out; `optimize` scales the result by `optimized_gain`."""

    def __init__(self, path: Path, optimize: bool) -> None:
        with np.load(path) as stored:
            self.weight, self.bias, self.gain = stored["weight"], stored["bias"], float(stored["gain"])
        self.gain = self.gain if optimize else 1.0
        outputs, features = self.weight.shape
        self.inputs = (TensorSpec("x", (1, features), "int8", "NC", 0.05, 3),)
        self.outputs = (TensorSpec("y", (1, outputs), "int8", "NC", 0.1, -2),)

    def run(self, arrays):
        x = (arrays[0].astype(np.float64) - 3) * 0.05
        y = (x @ self.weight.T + self.bias) * self.gain
        return [np.clip(np.rint(y / 0.1) - 2, -128, 127).astype(np.int8)]

    def placement(self):
        return []


class LinearRuntime:
    name, version = "linear", "1"

    def open(self, path, *, threads=1, optimize=True):
        return LinearSession(path, optimize)


class Arrays:
    """A data source over arrays in memory."""

    def __init__(self, inputs, targets=None, labels=(), rows=()):
        self.inputs, self.targets, self.labels, self.rows = inputs, targets, labels, rows
        self.preprocessing = None

    def __len__(self):
        return len(self.inputs)

    def batches(self, size, *, shuffle_seed=None):
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            targets = None if self.targets is None else self.targets[part]
            yield Batch((self.inputs[part],), targets, tuple(self.rows[part]))


@pytest.fixture
def linear(monkeypatch, tmp_path):
    """Returns write(weight, bias, suffix, gain) -> path; every format is opened by LinearRuntime."""
    load = registry.load
    monkeypatch.setattr(
        registry, "load", lambda room, name: LinearRuntime if room == "runtimes" else load(room, name)
    )

    def write(weight, bias, suffix=".tflite", gain=1.0):
        path = tmp_path / f"model{suffix}"
        with path.open("wb") as stream:
            np.savez(stream, weight=weight, bias=bias, gain=gain)
        return path

    return write


@pytest.fixture
def problem():
    """weight [3, 4], bias [3], inputs float32 [600, 4], the float model as a callable."""
    rng = np.random.default_rng(7)
    weight, bias = rng.normal(size=(3, 4)), rng.normal(size=3) * 0.2
    inputs = rng.normal(size=(600, 4)).astype(np.float32)

    def reference(arrays):
        return [(arrays[0] @ weight.T + bias).astype(np.float32)]

    return weight, bias, inputs, reference


@pytest.fixture
def arrays_source():
    return Arrays
