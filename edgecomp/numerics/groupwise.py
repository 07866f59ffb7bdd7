"""Weights of few bits with a scale for every group of inputs: real = (q - zero_point) * scale.

Shapes: weight [out, in]; scale and zero point [out, in / group]. Scales are numbers that float16 holds, so
that every format stores the same one. Symmetric integers use the full range [-2^(b-1), 2^(b-1) - 1] with
zero point 0; asymmetric ones the same range with a zero point inside it.

Example, 4 bits, one group of four: [-0.8, 0.1, 0.3, 0.7] -> scale 0.1, integers [-8, 1, 3, 7].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgecomp.spec import QuantSpec, TensorQuantization

SIZES = (128, 64, 32, 16)
"""Group sizes that all formats know, largest first."""
_SHARES = tuple(np.linspace(1.0, 0.5, 21))
_SMALLEST = 2.0**-20
"""A group of zeros still gets a scale that float16 holds."""
_LARGEST = 60000.0
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Grid:
    """The integers that a weight may take: `bits`, with or without a zero point, `group` inputs a scale.

    `narrow`: without the most negative one.
    """

    bits: int
    symmetric: bool
    group: int
    narrow: bool = False

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) + int(self.narrow)

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1


def group_for(inputs: int, wanted: int | None) -> int:
    """The group size of a layer with `inputs` inputs: the largest known one that divides, at most `wanted`.

    Where none divides, or `wanted` is None, it is all inputs: one scale for each output.
    """
    if wanted is None:
        return inputs
    return next((size for size in SIZES if size <= wanted and inputs % size == 0), inputs)


def halves(scale: np.ndarray) -> np.ndarray:
    """The nearest scale that float16 holds, positive; float32."""
    return np.clip(scale, _SMALLEST, _LARGEST).astype(np.float16).astype(np.float32)


def round_to(weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, grid: Grid) -> np.ndarray:
    """Integers int8 [out, in], to nearest."""
    parts = weight.reshape(*scale.shape, grid.group)
    steps = np.rint(parts / scale[..., None]) + zero[..., None]
    return np.clip(steps, grid.low, grid.high).astype(np.int8).reshape(weight.shape)


def restore(values: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Integers [out, in] -> float32 [out, in]."""
    parts = values.reshape(*scale.shape, -1).astype(np.float32) - zero[..., None].astype(np.float32)
    return (parts * scale[..., None]).reshape(values.shape)


def searched(
    weight: np.ndarray, grid: Grid, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of every group, with the least sum of importance * (w - rounded)^2.

    Tried are 21 shares of the group's range, from all of it to half: clipping the largest weights makes all
    steps finer. `importance` [in], for instance the mean square of every input (the diagonal of GPTQ's
    Hessian); None: all alike.
    """
    rows = max(_CHUNK // weight.shape[1], 1)
    parts = [_searched(weight[i : i + rows], grid, importance) for i in range(0, len(weight), rows)]
    return np.concatenate([s for s, _ in parts]), np.concatenate([z for _, z in parts])


def _searched(weight: np.ndarray, grid: Grid, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    parts = weight.astype(np.float32).reshape(len(weight), -1, grid.group)
    matters = None if importance is None else importance.astype(np.float32).reshape(-1, grid.group)
    low, high = parts.min(axis=2), parts.max(axis=2)
    best, best_zero = _candidate(low, high, 1.0, grid)
    best_error = np.full(best.shape, np.inf, np.float32)
    for share in _SHARES:
        scale, zero = _candidate(low, high, share, grid)
        shift = zero[..., None].astype(np.float32)
        steps = np.clip(np.rint(parts / scale[..., None]) + shift, grid.low, grid.high)
        square = np.square((steps - shift) * scale[..., None] - parts)
        error = square.sum(axis=2) if matters is None else np.einsum("ogk,gk->og", square, matters)
        better = error < best_error
        best, best_zero = np.where(better, scale, best), np.where(better, zero, best_zero)
        best_error = np.minimum(error, best_error)
    return best, best_zero


def _candidate(low: np.ndarray, high: np.ndarray, share: float, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    if grid.symmetric:
        scale = halves(np.maximum(low / grid.low, high / grid.high) * share)
        return scale, np.zeros(scale.shape, np.int32)
    low, high = np.minimum(low, 0) * share, np.maximum(high, 0) * share
    scale = halves((high - low) / (grid.high - grid.low))
    zero = np.clip(np.rint(grid.low - low / scale), grid.low, grid.high)
    return scale, zero.astype(np.int32)


def assemble(
    values: np.ndarray, scale: np.ndarray, zero: np.ndarray, grid: Grid, shape: tuple[int, ...]
) -> TensorQuantization:
    """The plan's entry of a weight; one group for all inputs becomes one scale a channel."""
    whole = scale.shape[1] == 1
    spec = QuantSpec(
        bits=grid.bits,
        symmetric=grid.symmetric,
        axis=0,
        group_size=None if whole else grid.group,
        narrow=grid.narrow,
    )
    if whole:
        scale, zero = scale[:, 0], zero[:, 0]
    return TensorQuantization(
        spec, scale.astype(np.float32), zero.astype(np.int32), values.astype(np.int8).reshape(shape)
    )


def in_groups(q: TensorQuantization) -> tuple[np.ndarray, np.ndarray, int]:
    """Scale and zero point as [out, groups], and the inputs of a group, also for one scale a channel."""
    if q.values is None:
        raise ValueError("a stored weight has integers")
    if q.spec.group_size is not None:
        return q.scale, q.zero_point, q.spec.group_size
    out, inputs = q.values.shape[0], int(np.prod(q.values.shape[1:]))
    shape = (out, 1)
    return (
        np.broadcast_to(q.scale.reshape(-1, 1), shape),
        np.broadcast_to(q.zero_point.reshape(-1, 1), shape),
        inputs,
    )


def bits_per_weight(q: TensorQuantization, scale_bits: int = 16) -> float:
    """Bits that a weight takes with its share of scales (and zero points, where they are not all 0)."""
    if q.values is None:
        raise ValueError("a stored weight has integers")
    extra = scale_bits + (0 if q.spec.symmetric else q.spec.bits)
    return float(q.spec.bits + extra * q.scale.size / q.values.size)
