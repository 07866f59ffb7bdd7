"""MIL's quantize and dequantize, for programs with quantized activations."""

from __future__ import annotations

import torch
from torch import Tensor

from edgecomp.runtimes.coreml_args import Table, along

_LIMITS = {"int8": (-128, 127, torch.int8), "uint8": (0, 255, torch.uint8)}


def quantize(
    input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: Tensor | int = 0
) -> Tensor:
    """clip(round(input / scale) + zero_point), rounded half to even."""
    low, high, dtype = _LIMITS[output_dtype]
    scaled = torch.round(input / along(scale, int(axis), input.dim()))
    if zero_point is not None:
        scaled = scaled + along(zero_point, int(axis), input.dim()).to(scaled.dtype)
    return scaled.clamp(low, high).to(dtype)


def dequantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: Tensor | int = 0
) -> Tensor:
    """scale * (input - zero_point)."""
    centred = input.to(torch.float32)
    if zero_point is not None:
        centred = centred - along(zero_point, int(axis), input.dim()).to(torch.float32)
    return along(scale, int(axis), input.dim()) * centred


OPS: Table = {"dequantize": dequantize, "quantize": quantize}
