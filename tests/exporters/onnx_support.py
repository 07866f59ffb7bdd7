"""Small candidates, and the shortest way from a module to an opened ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp.compress.ptq import Quantize
from edgecomp.exporters.onnx import OnnxExporter
from edgecomp.runtimes.onnxruntime import OnnxRuntime, OnnxSession
from edgecomp.spec import Artifact, Batch, Candidate, Data, Preprocessing, TensorSpec


@dataclass
class Rows:
    """A data source over one array for each model input."""

    inputs: tuple[np.ndarray, ...]
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield Batch(tuple(a[start : start + size] for a in self.inputs))


class Function(nn.Module):
    """A module of one function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def candidate_of(module: nn.Module, *inputs: Tensor) -> Candidate:
    specs = tuple(
        TensorSpec(f"x{n}" if n else "x", tuple(i.shape), str(i.dtype).removeprefix("torch."))
        for n, i in enumerate(inputs)
    )
    return Candidate(module.eval(), specs)


def export(candidate: Candidate, path: Path, target: str = "onnx-fp32", **settings: object) -> Artifact:
    return OnnxExporter(target, **settings).export(candidate, Data(), path)  # type: ignore[arg-type]


def session_of(candidate: Candidate, path: Path, target: str = "onnx-fp32") -> OnnxSession:
    return OnnxRuntime().open(export(candidate, path, target).path, optimize=False)


def normal(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, spread, shape).astype(np.float32))


def quantized(module: nn.Module, rows: np.ndarray, **settings: object) -> Candidate:
    """The module quantized on `rows` [N, ...], batch 1."""
    candidate = candidate_of(module, torch.from_numpy(rows[:1]))
    return Quantize(**settings)(candidate, Data(calibration=Rows((rows,))))  # type: ignore[arg-type]
