"""Palettes: optimal one-dimensional k-means, exact, for many groups of values at once.

Source: Wang and Song, "Ckmeans.1d.dp: Optimal k-means Clustering in One Dimension by Dynamic Programming",
The R Journal 3/2, 2011 (the recurrence); Groenlund et al., "Fast Exact k-Means, k-Medians and Bregman
Divergence Clustering in 1D", arXiv:1701.07204, 2017 (prefix sums, and the monotone minima that make every
layer O(n log n) by divide and conquer). Clusters of sorted values are intervals, so

    D[k][j] = min over i of D[k-1][i] + cost(i, j),    cost(i, j) = sum w x^2 - (sum w x)^2 / sum w

over the values i+1 .. j. The first term telescopes, so the largest sum of (sum w x)^2 / sum w is found
instead. The best i grows with j, and with k: both bound the search.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_CHUNK = 1 << 20
"""Values whose tables are held at once: 16 layers of int32 are then 64 MB."""
_POLISH = 50


@dataclass(frozen=True, eq=False)
class Palettes:
    """`lut` [groups, entries] float32, ascending in each row; `indices` [groups, values] uint8."""

    lut: np.ndarray
    indices: np.ndarray

    def values(self) -> np.ndarray:
        """The values that the palettes stand for, [groups, values] float32."""
        return np.take_along_axis(self.lut, self.indices.astype(np.intp), axis=1)


def fit(
    values: np.ndarray,
    entries: int,
    *,
    importance: np.ndarray | None = None,
    resolution: int | None = None,
    dtype: np.dtype | type = np.float16,
) -> Palettes:
    """Palettes of `entries` values that minimize sum w (x - palette)^2 in every group.

    `values` [groups, n] finite floats; `importance` same shape, not negative (None: all 1), for instance
    the Fisher information of every weight. `dtype`: the type in which a palette is stored; its entries are
    rounded to it and every value takes the nearest. Groups of at most `resolution` values (default
    32 * entries) are solved exactly. Larger ones are put on a histogram of that many equal bins first: the
    cost is exact, only the borders between clusters are multiples of a bin, and Lloyd's algorithm then
    moves them to their places.

    Example: fit([[0, 1, 10, 11]], 2) -> lut [[0.5, 10.5]], indices [[0, 0, 1, 1]].
    """
    _check(values, entries, importance)
    resolution = 32 * entries if resolution is None else resolution
    groups, n = values.shape
    lut = np.empty((groups, entries), np.float32)
    indices = np.empty((groups, n), np.uint8)
    rows = max(1, min(_CHUNK // min(n, resolution), 4 * _CHUNK // n))
    for start in range(0, groups, rows):
        part = slice(start, start + rows)
        weights = None if importance is None else importance[part]
        lut[part] = _centroids(values[part].astype(np.float64), weights, entries, resolution)
    lut = np.sort(lut.astype(dtype).astype(np.float32), axis=1)
    for row in range(groups):
        indices[row] = nearest(values[row], lut[row])
    return Palettes(lut, indices)


def _check(values: np.ndarray, entries: int, importance: np.ndarray | None) -> None:
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"values have shape {values.shape}; expected [groups, n], not empty")
    if not 1 <= entries <= 256:
        raise ValueError(f"entries is {entries}; expected 1 to 256")
    if not np.all(np.isfinite(values)):
        raise ValueError("values hold NaN or Inf")
    if importance is None:
        return
    if importance.shape != values.shape:
        raise ValueError(f"importance has shape {importance.shape}, values {values.shape}")
    if not np.all(np.isfinite(importance)) or np.any(importance < 0):
        raise ValueError("importance must be finite and not negative")


def nearest(values: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Index of the nearest entry of an ascending palette for every value; of two, the smaller entry."""
    middles = (palette[1:].astype(np.float64) + palette[:-1]) / 2
    return np.searchsorted(middles, values, side="left").astype(np.uint8)


def _polish(values: np.ndarray, weights: np.ndarray | None, lut: np.ndarray) -> np.ndarray:
    """Lloyd's algorithm on sorted rows [groups, n] from `lut` [groups, entries], until nothing moves.

    Prefix sums make a step cost entries * log(n) for every group.
    """
    points, mass, moment = _sorted_sums(values, weights)
    lut = np.sort(lut, axis=1)
    for _ in range(_POLISH):
        middles = (lut[:, 1:] + lut[:, :-1]) / 2
        borders = np.stack(
            [np.searchsorted(p, m, side="right") for p, m in zip(points, middles, strict=True)]
        )
        borders = np.pad(borders, ((0, 0), (1, 1)), constant_values=((0, 0), (0, points.shape[1])))
        share = np.diff(np.take_along_axis(mass, borders, axis=1), axis=1)
        sums = np.diff(np.take_along_axis(moment, borders, axis=1), axis=1)
        moved = np.divide(sums, share, out=lut.copy(), where=share > 0)
        if np.array_equal(moved, lut):
            break
        lut = moved
    return lut


def _centroids(values: np.ndarray, weights: np.ndarray | None, entries: int, resolution: int) -> np.ndarray:
    """Optimal centroids [groups, entries] of rows of float64 values."""
    centre = values.mean(axis=1, keepdims=True)  # against cancellation in the prefix sums
    points, mass, moment = _points(values - centre, weights, resolution)
    found = _solve(mass, moment, entries)
    total_mass = np.take_along_axis(mass, found, axis=1)
    total_moment = np.take_along_axis(moment, found, axis=1)
    share, sums = np.diff(total_mass, axis=1), np.diff(total_moment, axis=1)
    # An interval without weight keeps its middle value; an empty one repeats its left neighbour's border.
    middle = (found[:, :-1] + np.maximum(found[:, 1:] - 1, found[:, :-1])) // 2
    fallback = np.take_along_axis(points, np.minimum(middle, points.shape[1] - 1), axis=1)
    means = np.divide(sums, share, out=fallback.copy(), where=share > 0)
    if values.shape[1] > resolution:
        means = _polish(values - centre, weights, means)
    return means + centre


def _points(
    values: np.ndarray, weights: np.ndarray | None, resolution: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted points [groups, m] and prefix sums [groups, m + 1] of weight and of weight * value."""
    if values.shape[1] > resolution:
        return _histogram(values, weights, resolution)
    return _sorted_sums(values, weights)


def _sorted_sums(values: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    order = np.argsort(values, axis=1, kind="stable")
    points = np.take_along_axis(values, order, axis=1)
    mass = np.ones_like(points) if weights is None else np.take_along_axis(weights, order, axis=1)
    return points, _prefix(mass), _prefix(mass * points)


def _histogram(
    values: np.ndarray, weights: np.ndarray | None, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    groups = values.shape[0]
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    width = np.maximum(high - low, np.finfo(np.float64).tiny)
    places = np.minimum(((values - low) / width * bins).astype(np.int64), bins - 1)
    flat = (places + np.arange(groups)[:, None] * bins).reshape(-1)
    share = None if weights is None else weights.reshape(-1).astype(np.float64)
    mass = np.bincount(flat, share, groups * bins).reshape(groups, bins).astype(np.float64)
    product = values.reshape(-1) if share is None else values.reshape(-1) * share
    moment = np.bincount(flat, product, groups * bins).reshape(groups, bins)
    middles = low + (np.arange(bins) + 0.5) * (width / bins)
    return middles, _prefix(mass), _prefix(moment)


def _prefix(values: np.ndarray) -> np.ndarray:
    """[groups, m] -> [groups, m + 1], sums of the first 0, 1, ..., m values of each row."""
    out = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=out[:, 1:], dtype=np.float64)
    return out


def _gain(mass: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """(sum w x)^2 / sum w; 0 for an interval without weight."""
    return np.divide(moment * moment, mass, out=np.zeros_like(mass), where=mass > 0)


def _solve(mass: np.ndarray, moment: np.ndarray, entries: int) -> np.ndarray:
    """Borders [groups, entries + 1] of the best intervals: interval k is points border[k] .. border[k+1] - 1."""
    groups, size = mass.shape
    best = _gain(mass, moment)  # one cluster for the first j points
    chosen = np.zeros((entries, groups, size), np.int32)
    for layer in range(1, entries):
        best, chosen[layer] = _next_layer(best, mass, moment, chosen[layer - 1])
    borders = np.zeros((groups, entries + 1), np.intp)
    borders[:, entries] = size - 1
    rows = np.arange(groups)
    for layer in range(entries - 1, 0, -1):
        borders[:, layer] = chosen[layer, rows, borders[:, layer + 1]]
    return borders


def _next_layer(
    best: np.ndarray, mass: np.ndarray, moment: np.ndarray, before: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One more cluster: for every j the best total and the border i it takes, [groups, size] each.

    Columns are solved from coarse to fine: those at odd multiples of `step` lie between two that are known,
    and their border lies between the borders of these two (monotone minima), nor below `before`.
    """
    groups, size = best.shape
    total = np.zeros((groups, size))
    border = np.zeros((groups, size), np.int64)
    step = 1 << max(size - 1, 1).bit_length()
    while step >= 1:
        columns = np.arange(step, size, 2 * step)
        if columns.size:
            low = np.maximum(border[:, columns - step], before[:, columns])
            after = columns + step
            known = after < size
            high = np.broadcast_to(columns, low.shape).copy()
            high[:, known] = np.minimum(high[:, known], border[:, after[known]])
            total[:, columns], border[:, columns] = _search(best, mass, moment, columns, low, high)
        step //= 2
    return total, border.astype(np.int32)


def _search(
    best: np.ndarray,
    mass: np.ndarray,
    moment: np.ndarray,
    columns: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """For each group and column the i in [low, high] with the largest best[i] + gain(i, column)."""
    groups, size = best.shape
    offset = (np.arange(groups) * size)[:, None]
    ends = (offset + columns).reshape(-1)
    first = (offset + low).reshape(-1)
    counts = (high - low).reshape(-1) + 1
    starts = np.cumsum(counts) - counts
    i = np.arange(int(counts.sum())) + np.repeat(first - starts, counts)
    flat_mass, flat_moment = mass.reshape(-1), moment.reshape(-1)
    share = np.repeat(flat_mass[ends], counts) - flat_mass[i]
    value = np.repeat(flat_moment[ends], counts) - flat_moment[i]
    value *= value
    with np.errstate(divide="ignore", invalid="ignore"):
        value /= share
    value[share <= 0] = 0.0
    value += best.reshape(-1)[i]
    top = np.maximum.reduceat(value, starts)
    hits = np.flatnonzero(value == np.repeat(top, counts))
    owner = np.searchsorted(starts, hits, side="right") - 1
    found = np.empty(starts.size, np.int64)
    found[owner[::-1]] = i[hits[::-1]]  # the smallest i of equals
    return top.reshape(low.shape), found.reshape(low.shape) - offset
