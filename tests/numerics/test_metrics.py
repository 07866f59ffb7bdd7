"""Metrics against numbers computed by hand and against scipy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from edgecomp.numerics import metrics


def test_sqnr_by_hand():
    assert metrics.sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 3.0])) == pytest.approx(13.9794, abs=1e-4)


def test_sqnr_of_identical_and_of_silent_reference():
    x = np.array([1.0, -2.0])
    assert metrics.sqnr_db(x, x) == math.inf
    assert metrics.sqnr_db(np.zeros(2), x) == -math.inf
    assert metrics.sqnr_db(np.zeros(2), np.zeros(2)) == math.inf
    assert math.isnan(metrics.sqnr_db(x, np.array([np.nan, 0])))


@pytest.mark.parametrize("a, b", [(np.zeros(2), np.zeros(3)), (np.zeros(0), np.zeros(0))])
def test_shapes_are_checked(a, b):
    with pytest.raises(ValueError, match="shapes differ|no values"):
        metrics.sqnr_db(a, b)


def test_cosine_by_hand():
    reference = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    test = np.array([[0.0, 2.0], [0.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    np.testing.assert_allclose(metrics.cosines(reference, test), [0.0, 1.0, 0.0, 1.0], atol=1e-12)
    assert metrics.cosine(reference, test) == pytest.approx(0.5)


def test_max_error_agreement_and_accuracy_by_hand():
    reference = np.array([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]])
    test = np.array([[0.2, 0.8], [0.3, 0.7], [0.1, 0.9]])
    assert metrics.max_abs_error(reference, test) == pytest.approx(0.5)
    assert metrics.top1_agreement(reference, test) == pytest.approx(2 / 3)
    assert metrics.accuracy(test, np.array([1, 0, 0])) == pytest.approx(1 / 3)


def test_ece_by_hand():
    """Two bins: (0.5, 1] holds confidences 0.6 (right), 0.9 (wrong): gap |1 - 1.5| / 2; nothing below."""
    probability = np.array([[0.6, 0.4], [0.1, 0.9]])
    assert metrics.expected_calibration_error(probability, np.array([0, 0]), bins=2) == pytest.approx(0.25)


def test_ece_of_the_perfectly_calibrated_is_zero():
    probability = np.tile([0.75, 0.25], (4, 1))
    assert metrics.expected_calibration_error(probability, np.array([0, 0, 0, 1])) == pytest.approx(0)


def test_brier_by_hand():
    """(0.6 - 1)^2 + 0.4^2 = 0.32; 0.1^2 + (0.9 - 1)^2 = 0.02."""
    probability = np.array([[0.6, 0.4], [0.1, 0.9]])
    assert metrics.brier(probability, np.array([0, 1])) == pytest.approx(0.17)


def test_probabilities_are_recognized():
    logits = np.array([[2.0, 0.0], [-1.0, 1.0]])
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(metrics.probabilities(logits), expected)
    np.testing.assert_allclose(metrics.probabilities(expected), expected)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_scipys_binomial_test(b, c):
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert metrics.mcnemar_exact(b, c) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_is_scipys(count, share):
    successes = round(share * count)
    expected = stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert metrics.wilson_interval(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


def _score_by_maximization(x, y, n, delta):
    """The score of Tango (1998), its nuisance parameter found by maximizing the likelihood numerically."""

    def loss(q):
        p12, p21 = q + delta, q
        other = 1 - p12 - p21
        if min(p12, p21, other) < 0:
            return math.inf
        terms = zip((x, y, n - x - y), (p12, p21, other), strict=True)
        return -sum(k * math.log(max(p, 1e-300)) for k, p in terms if k)

    low, high = max(0.0, -delta), (1 - delta) / 2
    q = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (x - y - n * delta) / math.sqrt(n * (2 * q + delta * (1 - delta)))


@pytest.mark.parametrize("gained, lost, count", [(3, 9, 50), (12, 2, 50), (1, 0, 30), (5, 5, 200)])
def test_paired_interval_ends_where_the_score_is_196(gained, lost, count):
    low, high = metrics.paired_difference_interval(gained, lost, count)
    assert low < (gained - lost) / count < high
    assert _score_by_maximization(gained, lost, count, low) == pytest.approx(1.95996, abs=2e-3)
    assert _score_by_maximization(gained, lost, count, high) == pytest.approx(-1.95996, abs=2e-3)


def test_paired_interval_of_no_difference_is_not_certain():
    """With no discordant pair the score is n delta / sqrt(n delta (1 - delta)): delta = z^2 / (n + z^2)."""
    end = 1.959963984540054**2 / (20 + 1.959963984540054**2)
    assert metrics.paired_difference_interval(0, 0, 20) == pytest.approx((-end, end), abs=1e-6)


def test_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(3).normal(size=400)
    low, high = metrics.bootstrap_interval(lambda rows: float(values[rows].mean()), 400)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_is_repeatable_and_leaves_nan_out():
    def statistic(rows):
        return math.nan if rows[0] % 2 else float(rows.mean())

    first = metrics.bootstrap_interval(statistic, 50, resamples=100)
    assert first == metrics.bootstrap_interval(statistic, 50, resamples=100)
    assert all(math.isfinite(v) for v in first)


@pytest.mark.parametrize(
    "call", [lambda: metrics.wilson_interval(3, 2), lambda: metrics.paired_difference_interval(3, 3, 5)]
)
def test_impossible_counts_are_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()


def test_samples_for_proportion_by_hand():
    """Cochran: 1.96^2 * 0.9 * 0.1 / 0.02^2 = 864.3."""
    assert metrics.samples_for_proportion(0.9, 0.02) == 865
