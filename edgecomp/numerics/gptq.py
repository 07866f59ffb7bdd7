"""Rounding that knows the inputs: second-order (GPTQ) rounding of weights on a fixed grid, and descent.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
ICLR 2023, algorithm 1 (columns in order of falling diagonal, errors spread by the inverse Hessian).

Shapes: weights [groups, out, d], Hessians (sums of x x^T over inputs) [groups, d, d], scales [groups, out].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

Nearest = Callable[[np.ndarray], np.ndarray]

_DAMPING = 0.01
"""Share of the mean diagonal that is added to a Hessian, as in the GPTQ paper."""
_BLOCK = 64
_ALIGNED = (1.0, *(float(share) for share in np.linspace(0.98, 1.1, 40)))


def damped(hessian: np.ndarray, share: float = _DAMPING) -> np.ndarray:
    """Hessian plus `share` of its mean diagonal, so that it can be inverted; float64."""
    result = hessian.astype(np.float64).copy()
    d = result.shape[-1]
    mean = np.einsum("gii->g", result) / d
    result[:, np.arange(d), np.arange(d)] += np.maximum(share * mean, 1e-12)[:, None]
    return result


def clipped_scales(
    weight: np.ndarray, hessian: np.ndarray, qmax: int, shares: tuple[float, ...]
) -> np.ndarray:
    """For each output the scale, among `shares` of min-max, with the least error on the inputs: e H e^T."""
    largest = np.abs(weight).max(axis=2)
    tried = (np.maximum(largest * share / qmax, 2.0**-40) for share in shares)
    best = _least_error(weight, hessian, largest / qmax, tried, lambda scale: nearest(weight, scale, qmax))
    return np.maximum(best, 2.0**-40)


def _least_error(
    weight: np.ndarray, hessian: np.ndarray, start: np.ndarray, tried: Iterable[np.ndarray], rounded: Nearest
) -> np.ndarray:
    """For each output the first of the scales tried whose integers, `rounded(scale)`, err least: e H e^T."""
    best, best_error = start, np.full(start.shape, np.inf)
    for scale in tried:
        error = weight - rounded(scale) * scale[:, :, None]
        cost = np.einsum("god,god->go", error @ hessian, error)
        better = cost < best_error
        best, best_error = np.where(better, scale, best), np.where(better, cost, best_error)
    return best


def nearest(weight: np.ndarray, scale: np.ndarray, qmax: int) -> np.ndarray:
    return np.clip(np.rint(weight / scale[:, :, None]), -qmax, qmax)


def aligned_scales(
    weight: np.ndarray,
    hessian: np.ndarray,
    scale: np.ndarray,
    qmax: int,
    shares: tuple[float, ...] = _ALIGNED,
) -> np.ndarray:
    """For each output the scale near the one given at which its rounded weights err least, e H e^T.

    A few weights meet the grid better at one scale than at the next; the sum over many hardly differs. Each
    share costs a whole rounding: for depthwise layers.
    """
    tried = (scale * share for share in shares)
    return _least_error(
        weight, damped(hessian), scale, tried, lambda each: round_weights(weight, hessian, each, qmax)
    )


def round_weights(weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, qmax: int) -> np.ndarray:
    """Integers [groups, out, d] with a small error on the inputs: each column's error moves to later ones."""
    grid = sweep(weight, hessian, lambda column: np.clip(np.rint(column / scale), -qmax, qmax) * scale)
    return np.rint(grid / scale[:, :, None]).astype(np.int32)


def sweep(weight: np.ndarray, hessian: np.ndarray, nearest: Nearest) -> np.ndarray:
    """Weights of the same shape, every one from `nearest`, with a small error on the inputs; float64.

    Columns go in order of falling second moment of their input; `nearest` takes and gives one, [groups, out].
    """
    order = np.argsort(-np.einsum("gii->gi", hessian), axis=1)
    rows = np.arange(len(order))[:, None]
    sorted_weight = np.take_along_axis(weight.astype(np.float64), order[:, None, :], axis=2)
    sorted_hessian = damped(hessian)[rows[:, :, None], order[:, :, None], order[:, None, :]]
    chosen = _by_columns(sorted_weight, upper_factor(sorted_hessian), nearest)
    return np.take_along_axis(chosen, np.argsort(order, axis=1)[:, None, :], axis=2)


def upper_factor(hessian: np.ndarray) -> np.ndarray:
    """Upper U with U^T U = H^-1 for each [d, d]: with the order reversed H = L L^T, and U is L^-1 reversed.

    A third of the work of inverting H and factoring the inverse.
    """
    lower = np.linalg.cholesky(hessian[:, ::-1, ::-1])
    return _lower_inverse(lower)[:, ::-1, ::-1]


def _lower_inverse(lower: np.ndarray) -> np.ndarray:
    """Inverse of lower triangular matrices [groups, d, d], by halves; exact zeros above the diagonal.

    LAPACK's general inverse exchanges rows on some processors, and leaves rounding noise above it.
    """
    d = lower.shape[-1]
    if d <= _BLOCK:
        return np.tril(np.linalg.inv(lower))
    half = d // 2
    result = np.zeros_like(lower)
    first, last = _lower_inverse(lower[:, :half, :half]), _lower_inverse(lower[:, half:, half:])
    result[:, :half, :half], result[:, half:, half:] = first, last
    result[:, half:, :half] = -last @ (lower[:, half:, :half] @ first)
    return result


def _by_columns(weight: np.ndarray, factor: np.ndarray, nearest: Nearest) -> np.ndarray:
    """Column by column; within a block errors move at once, beyond it once a block."""
    chosen = np.zeros_like(weight)
    d = weight.shape[2]
    for start in range(0, d, _BLOCK):
        stop = min(start + _BLOCK, d)
        errors = np.zeros((*weight.shape[:2], stop - start))
        for j in range(start, stop):
            chosen[:, :, j] = nearest(weight[:, :, j])
            error = (weight[:, :, j] - chosen[:, :, j]) / factor[:, None, j, j]
            weight[:, :, j:stop] -= error[:, :, None] * factor[:, None, j, j:stop]
            errors[:, :, j - start] = error
        weight[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    return chosen


def descend(
    weight: np.ndarray,
    integers: np.ndarray,
    hessian: np.ndarray,
    scale: np.ndarray,
    qmax: int,
    sweeps: int = 4,
) -> np.ndarray:
    """Integers [groups, out, d] that make the error on the inputs, e H e^T, smaller still, column by column.

    Each column in turn takes the integer that is best for what all others are now, which is a rounding of
    w_j - (sum over k != j of e_k H_kj) / H_jj. The error never grows; it ends when a sweep changes nothing.
    Source: Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", 2023, algorithm
    1.
    """
    steps = scale[:, :, None]
    found = integers.astype(np.float64)
    moments = damped(hessian, 1e-6)
    diagonal = np.einsum("gii->gi", moments)
    pull = (found * steps - weight) @ moments
    for _ in range(sweeps):
        changed = False
        for j in range(weight.shape[2]):
            now = found[:, :, j]
            best = now * scale - pull[:, :, j] / diagonal[:, None, j]
            column = np.clip(np.rint(best / scale), -qmax, qmax)
            moved = (column - now) * scale
            if moved.any():
                changed = True
                pull += moved[:, :, None] * moments[:, None, j, :]
                found[:, :, j] = column
        if not changed:
            break
    return found.astype(np.int32)
