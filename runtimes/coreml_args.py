"""Arguments of MIL operations as Python values.

Inside the executor every value is a torch tensor (strings are str): float32 for both float types, int32,
bool, or a narrow integer. Parameters that describe an operation (axes, strides, ...) are small integer
tensors; these helpers turn them into what torch's functions take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Op = Callable[..., Any]
"""Keyword arguments are MIL's parameter names; an optional parameter has MIL's default."""

Table = Mapping[str, Op]


def ints(value: Tensor) -> list[int]:
    """An integer vector (or scalar) as a list."""
    return [int(v) for v in value.reshape(-1).tolist()]


def axes_of(value: Tensor | None, rank: int) -> list[int]:
    """Axes as non-negative numbers, in order; None means all."""
    return list(range(rank)) if value is None else sorted(a % rank for a in ints(value))


def flag(value: Tensor | bool) -> bool:
    return bool(value)


def along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """A vector shaped to broadcast along one axis of a tensor of that rank; a scalar stays."""
    if vector.dim() == 0:
        return vector
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)
