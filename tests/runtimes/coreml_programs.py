"""Core ML packages for tests, written by coremltools itself (not by our exporter)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgecomp.exporters.coreml_toolkit import conversion, ct, mb, quiet, types


def save_program(
    build: Callable[..., Any], inputs: list[np.ndarray], path: Path, *, target: str = "iOS18"
) -> Path:
    """A package of a MIL program; `build` takes MIL variables. Saved without any graph pass."""
    names = {
        np.dtype(np.float32): types.fp32,
        np.dtype(np.float16): types.fp16,
        np.dtype(np.int32): types.int32,
    }
    with quiet():
        specs = [mb.TensorSpec(shape=a.shape, dtype=names[a.dtype]) for a in inputs]
        program = mb.program(input_specs=specs, opset_version=getattr(ct.target, target))(build)
        model = conversion(
            lambda: ct.convert(
                program,
                source="milinternal",
                convert_to="mlprogram",
                minimum_deployment_target=getattr(ct.target, target),
                compute_precision=ct.precision.FLOAT32,
                pass_pipeline=ct.PassPipeline.EMPTY,
                skip_model_load=True,
            )
        )
        model.save(str(path))
    return path


def save_module(module: nn.Module, inputs: list[torch.Tensor], path: Path, **settings: Any) -> Path:
    """A float32 package of a traced module; integer inputs become int32."""
    with quiet(), torch.no_grad():
        traced = torch.jit.trace(module.eval(), tuple(inputs), check_trace=False)
        model = conversion(
            lambda: ct.convert(
                traced,
                inputs=[
                    ct.TensorType(
                        name=f"x{i}", shape=t.shape, dtype=np.float32 if t.is_floating_point() else np.int32
                    )
                    for i, t in enumerate(inputs)
                ],
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS18,
                skip_model_load=True,
                **{"compute_precision": ct.precision.FLOAT32, **settings},
            )
        )
        model.save(str(path))
    return path


def sqnr_db(reference: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise in decibel; 400 when both are equal."""
    noise = np.square(reference.astype(np.float64) - found).sum()
    return (
        10 * np.log10(max(np.square(reference.astype(np.float64)).sum(), 1e-30) / noise) if noise else 400.0
    )
