"""Ranges chosen from histograms: by hand where it can be, by what they promise elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.numerics import affine, ranges
from edgecomp.spec import QuantSpec

INT8 = QuantSpec()
INT4 = QuantSpec(bits=4)


def normal_with_outlier(bins: int = 2048) -> tuple[np.ndarray, float, float, np.ndarray]:
    """100,000 standard normal values and one at 40."""
    values = np.append(np.random.default_rng(0).standard_normal(100_000), 40.0)
    counts, edges = np.histogram(values, bins)
    return counts.astype(np.float64), float(edges[0]), float(edges[-1]), values.astype(np.float32)


def error(values: np.ndarray, low: float, high: float, spec: QuantSpec) -> float:
    q = affine.from_range(low, high, spec)
    return float(np.mean((affine.dequantize(affine.quantize(values, q), q) - values) ** 2))


def test_percentile_by_hand() -> None:
    """Ten bins of 1.0 with ten values each: 80 % are between 1 and 9; 100 % is everything."""
    counts = np.full(10, 10.0)
    assert ranges.percentile(counts, 0.0, 10.0, 80.0) == pytest.approx((1.0, 9.0))
    assert ranges.percentile(counts, 0.0, 10.0, 100.0) == (0.0, 10.0)


def test_percentile_keeps_a_heavy_first_bin() -> None:
    """After ReLU: half of the values are zero, so only the upper tail goes."""
    counts = np.array([500.0, *[50.0] * 9, 50.0])
    low, high = ranges.percentile(counts, 0.0, 11.0, 90.0)
    assert (low, high) == (0.0, 10.0)


@pytest.mark.parametrize("keep", [50.0, 100.1, -3.0])
def test_percentile_outside_its_domain(keep: float) -> None:
    with pytest.raises(ValueError, match="expected more than 50 and at most 100"):
        ranges.percentile(np.ones(4), 0.0, 1.0, keep)


def test_percentile_of_a_normal_distribution() -> None:
    """99.9 % of a normal distribution lies within 3.29 standard deviations."""
    counts, low, high, _ = normal_with_outlier()
    found = ranges.percentile(counts, low, high, 99.9)
    assert found == pytest.approx((-3.29, 3.29), abs=0.12)


def test_least_squares_finds_the_best_of_all_upper_ends() -> None:
    counts, low, high, values = normal_with_outlier()
    found = ranges.least_squares(counts, low, high, INT8)
    best = min(error(values, found[0], end, INT8) for end in np.linspace(3.0, high, 60))
    assert error(values, *found, INT8) < 1.02 * best < 0.9 * error(values, low, high, INT8)


def test_least_squares_clips_more_with_fewer_bits() -> None:
    counts, low, high, values = normal_with_outlier()
    found = ranges.least_squares(counts, low, high, INT4)
    assert found[1] < 0.6 * ranges.least_squares(counts, low, high, INT8)[1]
    assert error(values, *found, INT4) < 0.3 * error(values, low, high, INT4)


def test_least_squares_of_a_uniform_distribution_keeps_the_range() -> None:
    low, high = ranges.least_squares(np.full(2048, 7.0), -1.0, 3.0, INT8)
    assert low == pytest.approx(-1.0, abs=0.02) and high == pytest.approx(3.0, abs=0.02)


def test_least_squares_keeps_the_side_that_zero_bounds() -> None:
    counts = np.histogram(np.random.default_rng(0).exponential(1.0, 50_000), 2048, (0.0, 12.0))[0]
    low, high = ranges.least_squares(counts, 0.0, 12.0, INT4)
    assert low == 0.0 and 3.0 < high < 9.0


def test_entropy_clips_a_long_tail_and_keeps_the_body() -> None:
    """A Laplace distribution: 99 % of the values lie within 4.6, the largest of 200,000 near 12."""
    values = np.random.default_rng(0).laplace(size=200_000)
    counts, edges = np.histogram(values, 2048)
    low, high = ranges.entropy(counts.astype(np.float64), edges[0], edges[-1], INT8)
    assert edges[0] < low < -4.6 and 4.6 < high < edges[-1]


def test_entropy_of_a_uniform_distribution_keeps_the_range() -> None:
    assert ranges.entropy(np.full(2048, 7.0), -1.0, 3.0, INT8) == pytest.approx((-1.0, 3.0), abs=0.01)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 1000), min_size=8, max_size=64).filter(any),
    st.floats(-100, 100),
    st.floats(0.01, 100),
)
def test_every_choice_lies_within_what_was_seen(counts: list[int], low: float, width: float) -> None:
    histogram, high = np.array(counts, np.float64), low + width
    for found in (
        ranges.percentile(histogram, low, high, 99.0),
        ranges.entropy(histogram, low, high, INT8),
        ranges.least_squares(histogram, low, high, INT8, steps=6),
    ):
        slack = 1e-9 * max(abs(low), abs(high))
        assert min(low, 0.0) - slack <= found[0] <= found[1] <= max(high, 0.0) + slack
