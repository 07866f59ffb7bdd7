"""Values that float16 holds, counted instead of sorted: a tensor of millions has some ten thousand of them.

A program in float16 stores such weights. Every value is one of 65,536 bit patterns; weights (or their number)
are summed up by pattern in one pass, and the clusters of the distinct values are those of all of them.
"""

from __future__ import annotations

import numpy as np

PATTERNS = 1 << 16
_ORDERED = np.argsort(np.arange(PATTERNS, dtype=np.uint16).view(np.float16).astype(np.float32), kind="stable")
"""Patterns in the order of their values; NaN, which never comes, last."""


def patterns(values: np.ndarray) -> np.ndarray | None:
    """The bit patterns uint16 of float values, or None when float16 does not hold each of them."""
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    return halves.view(np.uint16) if np.array_equal(halves.astype(values.dtype), values) else None


def counted(bits: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """[groups, n] patterns -> distinct values float64 and their weights [groups, most], ascending.

    A group with fewer distinct values repeats its largest with weight 0.
    """
    rows = [_row(row, None if importance is None else importance[i]) for i, row in enumerate(bits)]
    most = max(len(values) for values, _ in rows)
    points = np.stack([np.pad(v, (0, most - len(v)), mode="edge") for v, _ in rows])
    return points, np.stack([np.pad(w, (0, most - len(w))) for _, w in rows])


def _row(bits: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    counts = np.bincount(bits, minlength=PATTERNS)
    used = _ORDERED[counts[_ORDERED] > 0]
    sums = counts if importance is None else np.bincount(bits, importance, PATTERNS)
    values = used.astype(np.uint16).view(np.float16).astype(np.float64)
    return values, sums[used].astype(np.float64)


def indices(bits: np.ndarray, middles: np.ndarray) -> np.ndarray:
    """The cluster of every pattern [n], uint8; `middles` ascending: a value on one belongs below it."""
    with np.errstate(invalid="ignore"):
        every = np.arange(PATTERNS, dtype=np.uint16).view(np.float16).astype(np.float64)
    return np.searchsorted(middles, every, side="left").astype(np.uint8)[bits]
