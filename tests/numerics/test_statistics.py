"""Statistics against numbers computed by hand, against NumPy, and against known coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.numerics import statistics

TIMES = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=60)


def test_percentile_by_hand() -> None:
    assert statistics.percentile([4, 1, 3, 2], 50) == 2.5
    assert statistics.percentile([10, 20, 30], 90) == pytest.approx(28.0)
    assert statistics.percentile([7], 99) == 7


@settings(deadline=None)
@given(TIMES, st.floats(0, 100))
def test_percentile_is_numpy_linear(samples: list[float], q: float) -> None:
    assert statistics.percentile(samples, q) == pytest.approx(np.percentile(samples, q), rel=1e-9)


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_unusable_samples_are_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match=r"no samples|NaN or Inf"):
        statistics.percentile(samples, 50)


def test_percentile_outside_its_domain() -> None:
    with pytest.raises(ValueError, match="q is 101"):
        statistics.percentile([1.0], 101)


def test_resampled_rows_are_whole_blocks() -> None:
    rows = statistics._resampled_rows(9, 4, 3, np.random.default_rng(1))
    assert rows.shape == (4, 9)
    for row in rows:
        for block in row.reshape(3, 3):
            assert list(np.diff(block) % 9) == [1, 1]


def test_interval_of_equal_samples_is_a_point() -> None:
    assert statistics.median_interval([3.0] * 20) == statistics.Interval(3.0, 3.0)


def test_interval_is_reproducible_and_holds_the_median() -> None:
    samples = np.random.default_rng(3).lognormal(size=101)
    first = statistics.median_interval(samples)
    assert first == statistics.median_interval(samples)
    assert float(np.median(samples)) in first


def test_many_samples_are_drawn_in_pieces() -> None:
    pieces = list(statistics._pieces(300_000, None, None, 0))
    assert sum(len(rows) for rows in pieces) == 200 and max(rows.size for rows in pieces) <= 2_000_000
    with pytest.raises(ValueError, match="resamples is 0"):
        statistics.median_interval([1.0], resamples=0)


def test_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = sum(
        0.0 in statistics.median_interval(generator.normal(size=60), resamples=400, seed=i)
        for i in range(300)
    )
    assert 0.88 <= hits / 300 <= 0.99


def test_blocks_widen_the_interval_of_correlated_samples() -> None:
    walk = np.repeat(np.random.default_rng(5).normal(10, 1, 40), 5)
    alone = statistics.median_interval(walk, block=1)
    together = statistics.median_interval(walk)
    assert together.high - together.low > alone.high - alone.low


def test_comparison_by_hand() -> None:
    a = [1.0, 1.0, 1.0, 1.0]
    result = statistics.compare_medians(a, [2.0, 2.0, 2.0, 2.0])
    assert (result.ratio, result.interval, result.faster) == (2.0, statistics.Interval(2.0, 2.0), "a")
    assert statistics.compare_medians([2.0] * 4, a).faster == "b"
    assert statistics.compare_medians(a, a).faster is None


def test_pairing_cancels_a_common_disturbance() -> None:
    generator = np.random.default_rng(2)
    common = 10 * generator.lognormal(0, 0.5, 200)
    result = statistics.compare_medians(common, common * 1.02)
    assert result.faster == "a"
    assert result.interval.low == pytest.approx(1.02) and result.interval.high == pytest.approx(1.02)


def test_equal_series_cannot_be_told_apart() -> None:
    generator = np.random.default_rng(4)
    result = statistics.compare_medians(generator.lognormal(0, 0.1, 60), generator.lognormal(0, 0.1, 60))
    assert result.faster is None and 1.0 in result.interval


def test_comparison_needs_pairs_and_positive_times() -> None:
    with pytest.raises(ValueError, match="2 and 1 samples"):
        statistics.compare_medians([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="zero or negative"):
        statistics.compare_medians([1.0], [0.0])


def test_warm_up_by_hand() -> None:
    assert not statistics.is_warm([5, 4, 3], window=2)
    assert not statistics.is_warm([9, 9, 4, 4], window=2)
    assert statistics.is_warm([9, 9, 4, 4, 4.1, 4.1], window=2)


def test_noise_verdicts() -> None:
    generator = np.random.default_rng(1)
    steady = statistics.noise(10 + generator.normal(0, 0.05, 90))
    assert steady.verdict == "steady" and steady.interval_width < 0.02
    noisy = statistics.noise(10 + generator.normal(0, 2.0, 90))
    assert noisy.verdict == "noisy"
    drifting = statistics.noise(np.linspace(10, 20, 90))
    assert drifting.verdict == "unusable"
    # medians of the first and last 30 of 10, 10.112, ...: 11.6292 and 18.3708
    assert drifting.drift == pytest.approx(18.3708 / 11.6292 - 1, rel=1e-4)
