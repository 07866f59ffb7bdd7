"""Half-quadratic quantization: scales for a loss that forgives outliers, without data.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023: minimize
|w - restored(w)|_p^p with p < 1 by alternating a shrinkage of the residual (their equation 4, generalized
soft thresholding) with an update of the group's parameter. There the zero point is a real number; formats
store it as an integer, so the last update is rounded. A symmetric grid has no zero point: its scale is
updated by least squares instead.
"""

from __future__ import annotations

import numpy as np

from edgecomp.numerics import groupwise
from edgecomp.numerics.groupwise import Grid

_POWER = 0.7
_BETA, _GROWTH = 10.0, 1.01
_STEPS = 20
_ROWS = 1 << 22


def fitted(weight: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point [out, groups] of a weight [out, in]."""
    rows = max(_ROWS // weight.shape[1], 1)
    parts = [_fitted(weight[i : i + rows], grid) for i in range(0, len(weight), rows)]
    return np.concatenate([s for s, _ in parts]), np.concatenate([z for _, z in parts])


def _fitted(weight: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    parts = weight.astype(np.float32).reshape(len(weight), -1, grid.group)
    low, high = parts.min(axis=2, keepdims=True), parts.max(axis=2, keepdims=True)
    if grid.symmetric:
        scale, zero = np.maximum(low / grid.low, high / grid.high), np.zeros_like(low)
    else:
        scale = (np.maximum(high, 0) - np.minimum(low, 0)) / (grid.high - grid.low)
        zero = grid.low - np.minimum(low, 0) / np.maximum(scale, 1e-12)
    scale = groupwise.halves(scale)
    best, best_error, beta = (scale, zero), np.full(scale.shape, np.inf, np.float32), _BETA
    for _ in range(_STEPS):
        steps = np.clip(np.rint(parts / scale + zero), grid.low, grid.high)
        residual = parts - (steps - zero) * scale
        error = np.abs(residual).mean(axis=2, keepdims=True)
        better = error < best_error
        best = (np.where(better, scale, best[0]), np.where(better, zero, best[1]))
        best_error = np.minimum(best_error, error)
        target = parts - _shrunk(residual, beta)
        if grid.symmetric:
            square = np.square(steps).sum(axis=2, keepdims=True)
            moved = (steps * target).sum(axis=2, keepdims=True) / np.maximum(square, 1)
            scale = groupwise.halves(np.where(moved > 0, moved, scale))
        else:
            zero = (steps - target / scale).mean(axis=2, keepdims=True)
        beta *= _GROWTH
    final = np.clip(np.rint(best[1]), grid.low, grid.high)
    return best[0][..., 0], final[..., 0].astype(np.int32)


def _shrunk(residual: np.ndarray, beta: float) -> np.ndarray:
    """Generalized soft thresholding: sign(r) * max(|r| - |r|^(p-1) / beta, 0)."""
    size = np.abs(residual)
    return np.sign(residual) * np.maximum(size - np.power(size + 1e-8, _POWER - 1) / beta, 0)
