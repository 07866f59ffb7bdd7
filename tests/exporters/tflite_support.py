"""Shared by the TFLite tests: export a module, run the file, compare with torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgecomp import door
from edgecomp.compress.ptq import Quantize
from edgecomp.exporters.tflite import TFLiteExporter
from edgecomp.graph import fake_quant
from edgecomp.runtimes.litert import LiteRTRuntime, LiteRTSession
from edgecomp.spec import Artifact, Batch, Candidate, Data, Preprocessing, TensorSpec

RUNTIME = LiteRTRuntime()
Functions = Mapping[str, Callable[..., Any]]


class Samples:
    """A data source of arrays already in memory."""

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __init__(self, *arrays: np.ndarray) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays[0])

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield Batch(tuple(a[start : start + size] for a in self.arrays))


class Many(nn.Module):
    """Independent functions of the same inputs, one output each: one file tests them all."""

    def __init__(self, functions: Functions) -> None:
        super().__init__()
        self.functions = functions
        for name, function in functions.items():
            if isinstance(function, nn.Module):
                self.add_module(name, function)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(function(*inputs) for function in self.functions.values())


def candidate(module: nn.Module, *inputs: torch.Tensor) -> Candidate:
    """`inputs` [1, ...]: examples; 4-D floats are pictures."""
    specs = tuple(
        TensorSpec(
            f"input_{i}",
            tuple(x.shape),
            str(x.dtype).removeprefix("torch."),
            "NCHW" if x.dim() == 4 and x.is_floating_point() else "",
        )
        for i, x in enumerate(inputs)
    )
    return Candidate(module.eval(), specs)


def export(made: Candidate, folder: Path, target: str, **settings: Any) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{len(list(folder.iterdir()))}.tflite"
    return TFLiteExporter(target, **settings).export(made, Data(), out)


def direct(path: Path, *, optimize: bool) -> LiteRTSession:
    """A session without the child process, for many small files that we wrote ourselves."""
    return LiteRTSession(path, RUNTIME.name, 1, "AUTO" if optimize else "BUILTIN_WITHOUT_DEFAULT_DELEGATES")


def op_types(opened: LiteRTSession) -> list[str]:
    return [p.type for p in opened.placement()]


def run(opened: LiteRTSession, inputs: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    """Float arrays in torch's order in and out, through the artifact's door."""
    stored = [door.into(x.numpy(), s) for x, s in zip(inputs, opened.inputs, strict=True)]
    return [door.out_of(y, s) for y, s in zip(opened.run(stored), opened.outputs, strict=True)]


def sqnr_db(reference: np.ndarray, found: np.ndarray) -> float:
    noise = float(((reference.astype(np.float64) - found) ** 2).sum())
    signal = float((reference.astype(np.float64) ** 2).sum())
    return float("inf") if noise == 0 else 10 * np.log10(max(signal, 1e-30) / noise)


def expected(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    with torch.no_grad():
        found = module(*inputs)
    return [t.numpy() for t in (found if isinstance(found, tuple | list) else [found])]


def check_float(
    functions: Functions,
    inputs: tuple[torch.Tensor, ...],
    folder: Path,
    *,
    target: str = "tflite-fp32",
    db: float = 100.0,
) -> LiteRTSession:
    """Every output is torch's, with XNNPACK and with the reference kernels; integers exactly."""
    module = Many(functions)
    artifact = export(candidate(module, *inputs), folder, target)
    wanted = dict(zip(functions, expected(module, inputs), strict=True))
    for optimize in (False, True):
        opened = RUNTIME.open(artifact.path, optimize=optimize)
        for (name, reference), found in zip(wanted.items(), run(opened, inputs), strict=True):
            assert found.shape == reference.shape, name
            if np.issubdtype(reference.dtype, np.floating):
                assert sqnr_db(reference, found) >= db, (name, optimize)
            else:
                np.testing.assert_array_equal(found.astype(reference.dtype), reference, err_msg=name)
    return opened


def calibration(inputs: tuple[torch.Tensor, ...], count: int = 8) -> Samples:
    """The example itself, and its values in other orders; integers are only repeated."""
    rng = np.random.default_rng(0)
    arrays = []
    for x in inputs:
        first = x.numpy()
        others = [
            rng.permutation(first.ravel()).reshape(first.shape) if x.is_floating_point() else first
            for _ in range(count - 1)
        ]
        arrays.append(np.concatenate([first, *others]))
    return Samples(*arrays)


def quantized(
    module: nn.Module,
    *inputs: torch.Tensor,
    bits: int = 8,
    exclude: tuple[str, ...] = (),
    weight_bits: int = 8,
) -> Candidate:
    """Plain rounding: the lowering is what is tested."""
    step = Quantize(
        observer="minmax", rounding="nearest", bias_correction="none",
        activation_bits=bits, exclude=exclude, weight_bits=weight_bits,
    )  # fmt: skip
    return step(candidate(module, *inputs), Data(calibration=calibration(inputs)))


def check_integer(
    functions: Functions,
    inputs: tuple[torch.Tensor, ...],
    folder: Path,
    *,
    bits: int = 8,
    steps: int | Mapping[str, int] = 1,
) -> LiteRTSession:
    """The integers of every output are those of the fake-quantized torch graph, within `steps` (1 where a
    mapping does not say).
    """
    made = quantized(Many(functions), *inputs, bits=bits)
    assert made.quantization is not None
    wanted = expected(fake_quant.fake_quantize(made.module, made.quantization), inputs)
    artifact = export(made, folder, "tflite-int8" if bits == 8 else "tflite-int16x8")
    for optimize in (False, True):
        opened = RUNTIME.open(artifact.path, optimize=optimize)
        found = zip(functions, wanted, run(opened, inputs), opened.outputs, strict=True)
        for name, reference, real, spec in found:
            assert real.shape == reference.shape, name
            if spec.scale is None:
                np.testing.assert_allclose(
                    real.astype(np.float32), reference, rtol=1e-5, atol=1e-6, err_msg=name
                )
                continue
            off = np.abs(np.rint((real - reference) / spec.scale)).max()
            allowed = steps if isinstance(steps, int) else steps.get(name, 1)
            assert off <= allowed, (name, optimize, off)
    return opened
