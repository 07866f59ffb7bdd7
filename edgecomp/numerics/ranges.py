"""From a histogram of a tensor's values to the range that quantizes it best.

Each function takes `counts` [bins] and the range [low, high] that the equal bins span, and gives (low, high).
"""

from __future__ import annotations

import numpy as np

from edgecomp.numerics import affine
from edgecomp.spec import QuantSpec

Range = tuple[float, float]


def percentile(counts: np.ndarray, low: float, high: float, keep: float) -> Range:
    """The range that holds the central `keep` percent of the values; each tail loses half of the rest."""
    if not 50.0 < keep <= 100.0:
        raise ValueError(f"percentile is {keep}; expected more than 50 and at most 100")
    cumulative = np.cumsum(counts, dtype=np.float64)
    tail = cumulative[-1] * (100.0 - keep) / 200.0
    edges = np.linspace(low, high, len(counts) + 1)
    first = int(np.searchsorted(cumulative, tail, side="right"))
    last = int(np.searchsorted(cumulative, cumulative[-1] - tail, side="left"))
    return float(edges[min(first, len(counts) - 1)]), float(edges[min(last, len(counts) - 1) + 1])


def least_squares(counts: np.ndarray, low: float, high: float, spec: QuantSpec, steps: int = 40) -> Range:
    """The range with the least mean squared error of rounding and clipping, by grid search from both ends.

    Each end shrinks on its own, so that a tensor bounded by zero on one side (after ReLU) keeps that side.
    """
    centres = _centres(counts, low, high)
    best, best_error = (low, high), _squared_error(counts, centres, low, high, spec)
    for end in (0, 1, 0, 1):
        for fraction in np.linspace(0.2, 1.0, steps):
            candidate: Range = (best[0], high * fraction) if end else (low * fraction, best[1])
            if candidate[0] > candidate[1]:
                continue
            error = _squared_error(counts, centres, *candidate, spec)
            if error < best_error:
                best, best_error = candidate, error
    return float(best[0]), float(best[1])


def _centres(counts: np.ndarray, low: float, high: float) -> np.ndarray:
    edges = np.linspace(low, high, len(counts) + 1)
    return ((edges[:-1] + edges[1:]) / 2).astype(np.float32)


def _squared_error(
    counts: np.ndarray, centres: np.ndarray, low: float, high: float, spec: QuantSpec
) -> float:
    q = affine.from_range(low, high, spec)
    restored = affine.dequantize(affine.quantize(centres, q), q)
    return float(np.sum(counts * (restored - centres) ** 2.0))


def entropy(counts: np.ndarray, low: float, high: float, spec: QuantSpec, steps: int = 64) -> Range:
    """The range whose quantized distribution has the least Kullback-Leibler divergence from the original.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017. Clipped values are counted in the edge bins.
    """
    levels = spec.qmax - spec.qmin + 1
    edges = np.linspace(low, high, len(counts) + 1)
    best, best_divergence = (low, high), np.inf
    for fraction in np.linspace(0.3, 1.0, steps):
        first = max(int(np.searchsorted(edges, low * fraction, side="right")) - 1, 0)
        first = min(first, len(counts) - 1)
        last = min(max(int(np.searchsorted(edges, high * fraction, side="left")), first + 1), len(counts))
        divergence = _divergence(counts, first, last, levels)
        if divergence <= best_divergence:
            best, best_divergence = (float(edges[first]), float(edges[last])), divergence
    return best


def _divergence(counts: np.ndarray, first: int, last: int, levels: int) -> float:
    kept = counts[first:last].astype(np.float64)
    original = kept.copy()
    original[0] += counts[:first].sum()
    original[-1] += counts[last:].sum()
    level = np.minimum(np.arange(len(kept)) * levels // max(len(kept), levels), levels - 1)
    occupied = kept > 0
    totals = np.bincount(level, weights=kept, minlength=levels)
    members = np.bincount(level, weights=occupied.astype(np.float64), minlength=levels)
    quantized = np.where(occupied, totals[level] / np.maximum(members[level], 1.0), 0.0)
    p = (original + 1e-9) / (original + 1e-9).sum()
    q = (quantized + 1e-9) / (quantized + 1e-9).sum()
    return float(np.sum(p * np.log(p / q)))
