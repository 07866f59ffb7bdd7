"""Palettes against enumeration of every partition, and against numbers worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgecomp.numerics import palettes


def _cost(values: np.ndarray, weights: np.ndarray, found: palettes.Palettes) -> float:
    return float((weights * (values - found.values()[0]) ** 2).sum())


def _best_cost(values: np.ndarray, weights: np.ndarray, entries: int) -> float:
    """Least weighted squared error over every way to cut the sorted values into intervals."""
    order = np.argsort(values)
    x, w = values[order], weights[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, len(x)), min(entries, len(x)) - 1):
        total = 0.0
        for a, b in itertools.pairwise((0, *cuts, len(x))):
            mass = w[a:b].sum()
            mean = (w[a:b] * x[a:b]).sum() / mass if mass else 0.0
            total += (w[a:b] * (x[a:b] - mean) ** 2).sum()
        best = min(best, total)
    return best


def test_by_hand() -> None:
    found = palettes.fit(np.array([[0.0, 10.0, 1.0, 11.0]]), 2)
    assert found.lut.tolist() == [[0.5, 10.5]]
    assert found.indices.tolist() == [[0, 1, 0, 1]]


def test_importance_moves_the_palette() -> None:
    values = np.array([[0.0, 1.0, 10.0]])
    found = palettes.fit(values, 2, importance=np.array([[3.0, 1.0, 1.0]]))
    assert found.lut.tolist() == [[0.25, 10.0]]
    # With all the weight on the upper two, these are kept apart and the first gives way.
    found = palettes.fit(values, 2, importance=np.array([[0.0, 1.0, 1.0]]))
    assert found.values()[0, 1:].tolist() == [1.0, 10.0]


_values = hnp.arrays(np.float64, st.integers(1, 9), elements=st.integers(-40, 40).map(lambda i: i / 4))


@settings(max_examples=200, deadline=None)
@given(_values, st.integers(1, 5), st.data())
def test_no_partition_is_better(values: np.ndarray, entries: int, data: st.DataObject) -> None:
    weights = np.array(
        data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values))), float
    )
    found = palettes.fit(values[None], entries, importance=weights[None], dtype=np.float64)
    assert _cost(values, weights, found) <= _best_cost(values, weights, entries) + 1e-3
    plain = palettes.fit(values[None], entries, dtype=np.float64)
    ones = np.ones_like(values)
    assert _cost(values, ones, plain) <= _best_cost(values, ones, entries) + 1e-3


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float32, (3, 40), elements=st.floats(-2, 2, width=16)), st.integers(2, 16))
def test_groups_do_not_touch_each_other(values: np.ndarray, entries: int) -> None:
    together = palettes.fit(values, entries)
    for row in range(3):
        alone = palettes.fit(values[row : row + 1], entries)
        assert alone.lut.tolist() == together.lut[row : row + 1].tolist()
        assert alone.indices.tolist() == together.indices[row : row + 1].tolist()


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float16, (2, 60), elements=st.floats(-2, 2, width=16)))
def test_every_value_takes_the_nearest_entry(values: np.ndarray) -> None:
    found = palettes.fit(values, 16)
    distance = np.abs(values[:, :, None].astype(np.float64) - found.lut[:, None, :])
    chosen = np.take_along_axis(distance, found.indices[:, :, None].astype(int), 2)[..., 0]
    assert np.array_equal(chosen, distance.min(2))


def test_values_on_a_palette_come_back_exactly() -> None:
    rng = np.random.default_rng(0)
    grid = np.sort(rng.normal(size=(5, 16)).astype(np.float16), axis=1)
    indices = rng.integers(0, 16, (5, 300))
    values = np.take_along_axis(grid, indices, 1)
    assert np.array_equal(palettes.fit(values, 16).values(), values.astype(np.float32))


def test_fewer_values_than_entries() -> None:
    found = palettes.fit(np.array([[3.0, -1.0, 3.0]]), 16)
    assert found.values().tolist() == [[3.0, -1.0, 3.0]]
    assert np.all(np.isfinite(found.lut))


@pytest.mark.parametrize("weighted", [False, True])
def test_histogram_is_within_a_thousandth_of_the_optimum(weighted: bool) -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_t(5, size=(3, 3000))
    importance = rng.gamma(1.0, size=values.shape) if weighted else None
    weights = np.ones_like(values) if importance is None else importance
    exact = palettes.fit(values, 16, importance=importance, resolution=3000, dtype=np.float32)
    fast = palettes.fit(values, 16, importance=importance, dtype=np.float32)
    optimum = (weights * (values - exact.values()) ** 2).sum(1)
    assert np.all((weights * (values - fast.values()) ** 2).sum(1) <= optimum * 1.001)


def test_beats_lloyd_from_many_starts() -> None:
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(size=150), rng.normal(5, 0.1, size=50)])
    ours = np.square(values - palettes.fit(values[None], 8, dtype=np.float32).values()[0]).sum()
    best = np.inf
    for _ in range(50):
        centres = rng.choice(values, 8, replace=False)
        for _ in range(30):
            owner = np.abs(values[:, None] - centres).argmin(1)
            centres = np.array(
                [values[owner == k].mean() if np.any(owner == k) else centres[k] for k in range(8)]
            )
        best = min(best, np.square(values - centres[np.abs(values[:, None] - centres).argmin(1)]).sum())
    assert ours <= best * (1 + 1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(3), 2), "expected \\[groups, n\\]"),
        ((np.zeros((1, 3)), 0), "entries is 0"),
        ((np.array([[np.nan]]), 2), "NaN or Inf"),
    ],
)
def test_bad_arguments(arguments: tuple[np.ndarray, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        palettes.fit(*arguments)


def test_bad_importance() -> None:
    with pytest.raises(ValueError, match="not negative"):
        palettes.fit(np.zeros((1, 2)), 2, importance=np.array([[1.0, -1.0]]))
    with pytest.raises(ValueError, match="shape"):
        palettes.fit(np.zeros((1, 2)), 2, importance=np.ones((1, 3)))


def test_counted_halves_give_what_sorted_values_do() -> None:
    """float16 values are counted by pattern; a shift beyond float16 makes the same groups be sorted."""
    values = (np.random.default_rng(5).standard_t(4, (2, 9000)) * 0.1).astype(np.float16).astype(np.float32)
    weights = np.random.default_rng(6).uniform(0, 2, values.shape)
    for importance in (None, weights):
        counted = palettes.fit(values, 16, importance=importance, dtype=np.float32)
        apart = palettes.fit(values * np.float32(1 + 2.0**-20), 16, importance=importance, dtype=np.float32)
        square = np.square(counted.values() - values) * (1 if importance is None else importance)
        other = np.square(apart.values() - values) * (1 if importance is None else importance)
        assert square.sum() == pytest.approx(other.sum(), rel=2e-3)
        assert (palettes.nearest(values[0], counted.lut[0]) == counted.indices[0]).all()


def test_a_large_group_takes_the_nearest_entry_by_pattern() -> None:
    values = np.linspace(-2, 2, 70000).astype(np.float16).astype(np.float32)[None]
    found = palettes.fit(values, 4)
    np.testing.assert_array_equal(found.indices[0], palettes.nearest(values[0], found.lut[0]))
    # Four equal parts of a uniform distribution: entries in the middle of each, the optimum.
    np.testing.assert_allclose(found.lut[0], [-1.5, -0.5, 0.5, 1.5], atol=4e-3)


def test_values_that_lie_on_a_palette_already_are_their_own_palette():
    """Long rows, where borders may lie at some places only; a row beside them is solved as ever."""
    rng = np.random.default_rng(0)
    tables = np.sort(rng.normal(size=(2, 16)).astype(np.float16).astype(np.float32))
    rows = np.stack([rng.choice(t, 3000, p=np.r_[0.9, np.full(15, 0.1 / 15)]) for t in tables])
    other = rng.normal(size=(1, 3000)).astype(np.float32)
    found = palettes.fit(np.concatenate([rows, other]), 16)
    np.testing.assert_array_equal(found.values()[:2], rows)
    np.testing.assert_array_equal(found.values()[2:], palettes.fit(other, 16).values())
    few = palettes.fit(np.array([[1.0, 2.0, 2.0, 1.0]]), 4)
    np.testing.assert_array_equal(few.values(), [[1.0, 2.0, 2.0, 1.0]])
    assert few.lut.shape == (1, 4)
