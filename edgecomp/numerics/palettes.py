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

from edgecomp.numerics import palette_halves

_CHUNK = 1 << 20
"""Values whose tables are held at once: 16 layers of int32 are then 64 MB."""
_POLISH = 50
_COUNTED_FROM = 4096
"""Values of a group from which counting float16 patterns is faster than sorting."""


@dataclass(frozen=True, eq=False)
class Palettes:
    """`lut` [groups, entries] float32, ascending in each row; `indices` [groups, values] uint8."""

    lut: np.ndarray
    indices: np.ndarray

    def values(self) -> np.ndarray:
        """The values that the palettes stand for, [groups, values] float32."""
        return _take(self.lut, self.indices.astype(np.intp))


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
    512, or 16 * entries) are solved exactly. In larger ones a border between clusters may lie at that many
    places only, spread over the histogram; Lloyd's algorithm then moves the borders to where they belong.

    Example: fit([[0, 1, 10, 11]], 2) -> lut [[0.5, 10.5]], indices [[0, 0, 1, 1]].
    """
    _check(values, entries, importance)
    resolution = max(512, 16 * entries) if resolution is None else resolution
    groups, n = values.shape
    lut = np.empty((groups, entries), np.float32)
    indices = np.empty((groups, n), np.uint8)
    bits = palette_halves.patterns(values) if n > _COUNTED_FROM else None
    rows = max(1, min(_CHUNK // min(n, resolution), 4 * _CHUNK // n))
    for start in range(0, groups, rows):
        part = slice(start, start + rows)
        weights = None if importance is None else importance[part]
        points = values[part].astype(np.float64) if bits is None else None
        if points is None:
            points, weights = palette_halves.counted(bits[part], weights)  # type: ignore[index]
        lut[part] = _centroids(points, weights, entries, resolution)
    few, known = _distinct(values, entries)
    lut[few] = known
    lut = np.sort(lut.astype(dtype).astype(np.float32), axis=1)
    for row in range(groups):
        if bits is None or n < palette_halves.PATTERNS:
            indices[row] = nearest(values[row], lut[row])
        else:
            indices[row] = palette_halves.indices(bits[row], _middles(lut[row]))
    return Palettes(lut, indices)


def _distinct(values: np.ndarray, entries: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows with at most `entries` different values, and these values, ascending, the last one repeated.

    They are their own palettes; in long rows the solver, which puts borders at some places only, may miss it.
    """
    few = np.flatnonzero(_differences(np.sort(values[:, : 4 * entries], axis=1)) < entries)
    ordered = np.sort(values[few], axis=1)
    kept = _differences(ordered) < entries
    few, ordered = few[kept], ordered[kept]
    lut = np.repeat(ordered[:, -1:], entries, axis=1)
    rank = np.cumsum(np.diff(ordered, axis=1) > 0, axis=1)
    np.put_along_axis(lut, np.pad(rank, ((0, 0), (1, 0))), ordered, axis=1)
    return few, lut


def _differences(ordered: np.ndarray) -> np.ndarray:
    return np.count_nonzero(np.diff(ordered, axis=1), axis=1)


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
    return np.searchsorted(_middles(palette), values, side="left").astype(np.uint8)


def _middles(palette: np.ndarray) -> np.ndarray:
    return (palette[1:].astype(np.float64) + palette[:-1]) / 2


def _centroids(values: np.ndarray, weights: np.ndarray | None, entries: int, resolution: int) -> np.ndarray:
    """Optimal centroids [groups, entries] of rows of float64 values."""
    centre = values.mean(axis=1, keepdims=True)  # against cancellation in the prefix sums
    points, mass, moment = _sorted_sums(values - centre, weights)
    if values.shape[1] <= resolution:
        borders = _solve(mass, moment, entries)
        return _means(points, mass, moment, borders) + centre
    places = _candidates(points, resolution)
    found = _solve(_take(mass, places), _take(moment, places), entries)
    lut = _means(points, mass, moment, _take(places, found))
    return _polish(points, mass, moment, lut) + centre


def _take(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.take_along_axis(rows, columns, axis=1)


def _sorted_sums(values: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted rows [groups, n] and prefix sums [groups, n + 1] of weight and of weight * value."""
    order = np.argsort(values, axis=1, kind="stable")
    points = _take(values, order)
    mass = np.ones_like(points) if weights is None else _take(weights, order)
    return points, _prefix(mass), _prefix(mass * points)


def _candidates(points: np.ndarray, count: int) -> np.ndarray:
    """About `count` places in sorted rows where a border may lie: half at equal counts, half at equal widths.

    The ones serve the dense middle of a distribution, the others its tails. [groups, candidates], ascending,
    first 0, last n.
    """
    groups, n = points.shape
    by_count = np.linspace(0, n, count // 2 + 1).astype(np.intp)
    shares = np.linspace(0, 1, count // 2 + 1)[1:-1]
    marks = points[:, :1] + shares * (points[:, -1:] - points[:, :1])
    by_width = np.stack([np.searchsorted(p, m) for p, m in zip(points, marks, strict=True)])
    return np.sort(
        np.concatenate([np.broadcast_to(by_count, (groups, by_count.size)), by_width], axis=1), axis=1
    )


def _means(points: np.ndarray, mass: np.ndarray, moment: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Weighted mean of every interval; one without weight has its middle value, an empty one its border's."""
    share, sums = np.diff(_take(mass, borders), axis=1), np.diff(_take(moment, borders), axis=1)
    middle = (borders[:, :-1] + np.maximum(borders[:, 1:] - 1, borders[:, :-1])) // 2
    fallback = _take(points, np.minimum(middle, points.shape[1] - 1))
    return np.divide(sums, share, out=fallback, where=share > 0)


def _polish(points: np.ndarray, mass: np.ndarray, moment: np.ndarray, lut: np.ndarray) -> np.ndarray:
    """Lloyd's algorithm on sorted rows from `lut` [groups, entries], until nothing moves.

    Prefix sums make a step cost entries * log(n) for every group.
    """
    lut = np.sort(lut, axis=1)
    for _ in range(_POLISH):
        middles = (lut[:, 1:] + lut[:, :-1]) / 2
        inner = np.stack([np.searchsorted(p, m, side="right") for p, m in zip(points, middles, strict=True)])
        borders = np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, points.shape[1])))
        share, sums = np.diff(_take(mass, borders), axis=1), np.diff(_take(moment, borders), axis=1)
        moved = np.divide(sums, share, out=lut.copy(), where=share > 0)
        if np.array_equal(moved, lut):
            break
        lut = moved
    return lut


def _prefix(values: np.ndarray) -> np.ndarray:
    """[groups, m] -> [groups, m + 1], sums of the first 0, 1, ..., m values of each row."""
    out = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=out[:, 1:], dtype=np.float64)
    return out


def _gain(mass: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """(sum w x)^2 / sum w; 0 for an interval without weight."""
    return np.divide(moment * moment, mass, out=np.zeros_like(mass), where=mass > 0)


def _solve(mass: np.ndarray, moment: np.ndarray, entries: int) -> np.ndarray:
    """Borders [groups, entries + 1] of the best intervals; k holds the points border[k] .. border[k+1] - 1.

    `mass`, `moment` [groups, columns]: prefix sums that start with 0; borders are columns of theirs.
    """
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
