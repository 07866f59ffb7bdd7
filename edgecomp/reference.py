"""The float model as parity sees it: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from edgecomp.errors import ModelError


class TorchReference:
    """Calls a module one sample at a time, as artifacts do: captured graphs have a batch of one.

    `module` in eval mode takes as many positional inputs as the data gives. Returns float32 arrays [N, ...]
    (integers stay). Raises ModelError when the module fails on the data, or gives no tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, inputs: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        parts = [self._one(inputs, i) for i in range(len(inputs[0]))]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def _one(self, inputs: tuple[np.ndarray, ...], i: int) -> list[np.ndarray]:
        tensors = [torch.from_numpy(np.ascontiguousarray(a[i : i + 1])) for a in inputs]
        try:
            with torch.no_grad():
                found = self.module(*tensors)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ModelError(
                f"the float model fails on inputs of shape {[tuple(t.shape) for t in tensors]}: {error}; "
                "check that the data is what the model takes"
            ) from error
        return [_array(t) for t in flatten(found)]


def flatten(found: Any) -> list[torch.Tensor]:
    """Outputs in order: a tensor, a tuple or list (nested), or a mapping (its values)."""
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, Mapping):
        return [t for value in found.values() for t in flatten(value)]
    if isinstance(found, tuple | list):
        return [t for value in found for t in flatten(value)]
    raise ModelError(f"the float model gives {type(found).__name__}; expected tensors")


def _array(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.detach().numpy()
    return array if array.dtype.kind in "iub" else array.astype(np.float32)
