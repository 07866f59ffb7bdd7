"""GPTQ on a grid of groups, and scales refitted to the integers that it chose.

Source: Frantar et al., "GPTQ", ICLR 2023, algorithm 1, with static groups (scales are found before, so
columns may be rounded in order of falling diagonal whatever their group). The refit is the
least-squares solution of min over s of (w - Q s) H (w - Q s)^T for every output; column g of Q holds the
integers of group g.
"""

from __future__ import annotations

import numpy as np

from edgecomp.numerics import gptq, groupwise
from edgecomp.numerics.groupwise import Grid

_DAMPING = 0.01
_BLOCK = 64
_ROWS = 4096
"""Outputs that are worked on at once; bounds memory for a head of 50,000 and more."""


def rounded(
    weight: np.ndarray, hessian: np.ndarray, grid: Grid, refits: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers int8 [out, in], scale and zero point [out, groups] for a small e H e^T, e = w - restored.

    `hessian` [in, in]: mean of x x^T over the layer's inputs. `refits`: rounds of refitting scales and
    rounding again, each kept by output where it lowers the error.
    """
    damped = _damped(hessian)
    order = np.argsort(-np.diag(damped), kind="stable")
    factor = gptq.upper_factor(damped[None][:, order[:, None], order])[0].astype(np.float32)
    parts = [
        _rows(weight[i : i + _ROWS], damped, order, factor, grid, refits)
        for i in range(0, len(weight), _ROWS)
    ]
    values, scale, zero = (np.concatenate(p) for p in zip(*parts, strict=True))
    return values, scale, zero


def error(restored: np.ndarray, weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """e H e^T of every output [out]."""
    off = (weight - restored).astype(np.float32)
    return np.einsum("oi,oi->o", off @ hessian.astype(np.float32), off)


def _rows(
    weight: np.ndarray, hessian: np.ndarray, order: np.ndarray, factor: np.ndarray, grid: Grid, refits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weight = weight.astype(np.float32)
    scale, zero = groupwise.searched(weight, grid, np.diag(hessian))
    values = _sweep(weight, order, factor, scale, zero, grid)
    best = error(groupwise.restore(values, scale, zero), weight, hessian)
    for _ in range(refits):
        moved = _refit(values, zero, scale, weight, hessian)
        again = _sweep(weight, order, factor, moved, zero, grid)
        found = error(groupwise.restore(again, moved, zero), weight, hessian)
        better = found < best
        values[better], scale[better] = again[better], moved[better]
        best = np.minimum(best, found)
        if not better.any():
            break
    return values, scale, zero


def _damped(hessian: np.ndarray) -> np.ndarray:
    """Hessian plus 1 % of its mean diagonal, float64; inputs that are always 0 count as that."""
    result = hessian.astype(np.float64).copy()
    result[np.diag_indices_from(result)] += max(_DAMPING * float(np.trace(result)) / len(result), 1e-10)
    return result


def _sweep(
    weight: np.ndarray,
    order: np.ndarray,
    factor: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    grid: Grid,
) -> np.ndarray:
    """Round column by column in `order`; an error moves to the columns not yet rounded."""
    groups = order // grid.group
    left = np.ascontiguousarray(weight[:, order].T)  # [in, out]: a column is one run of memory
    values = np.empty(left.shape, np.int8)
    steps, zeros = scale.T[groups], zero.T[groups].astype(np.float32)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        errors = np.empty((stop - start, left.shape[1]), np.float32)
        for j in range(start, stop):
            column = np.clip(np.rint(left[j] / steps[j]) + zeros[j], grid.low, grid.high)
            values[j] = column
            off = (left[j] - (column - zeros[j]) * steps[j]) / factor[j, j]
            left[j + 1 : stop] -= factor[j, j + 1 : stop, None] * off
            errors[j - start] = off
        left[stop:] -= factor[start:stop, stop:].T @ errors
    result = np.empty(weight.shape, np.int8)
    result[:, order] = values.T
    return result


def _refit(
    values: np.ndarray, zero: np.ndarray, scale: np.ndarray, weight: np.ndarray, hessian: np.ndarray
) -> np.ndarray:
    """Scales by least squares for fixed integers; a group whose scale would leave [1/2, 2] keeps its own."""
    outputs, groups = scale.shape
    size = weight.shape[1] // groups
    steps = values.reshape(outputs, groups, size).astype(np.float32) - zero[..., None].astype(np.float32)
    parts = hessian.astype(np.float32).reshape(groups, size, -1)
    moved = np.matmul(steps.transpose(1, 0, 2), parts).transpose(1, 0, 2)  # [out, groups, in]
    right = np.einsum("ogi,oi->og", moved, weight)
    left = np.einsum("oghk,ohk->ogh", moved.reshape(outputs, groups, groups, size), steps)
    diagonal = np.arange(groups)
    left[:, diagonal, diagonal] += 1e-6 * left[:, diagonal, diagonal].mean(axis=1, keepdims=True) + 1e-12
    found = np.linalg.solve(left, right[..., None])[..., 0]
    usable = np.isfinite(found) & (found > 0.5 * scale) & (found < 2 * scale)
    return groupwise.halves(np.where(usable, found, scale))
