"""Saturation risk against enumeration of all pairs."""

import numpy as np
import pytest

from edgecomp.numerics.saturation import arm_pair_risk, in_kernel_order, x86_excess, x86_pair_risk

RNG = np.random.default_rng(0)


def enumerated(row):
    """Both activations from 0 to 255: the extremes are at the corners."""
    risky = [
        any(not -32768 <= a * int(u) + b * int(v) <= 32767 for a in (0, 255) for b in (0, 255))
        for u in row
        for v in row
    ]
    return np.mean(risky)


@pytest.mark.parametrize("spread", [20, 60, 127])
def test_x86_is_the_enumeration(spread):
    weights = RNG.integers(-spread, spread + 1, (3, 2, 3, 3)).astype(np.int8)
    expected = np.mean([enumerated(w.ravel()) for w in weights])
    assert x86_pair_risk(weights) == pytest.approx(expected, abs=1e-12)


def test_x86_by_hand_and_at_the_limit():
    assert x86_pair_risk(np.array([[127, 127, 1, 1]], np.int8)) == pytest.approx(4 / 16)
    assert x86_pair_risk(np.array([[64, 64]], np.int8)) == 0
    assert x86_pair_risk(np.array([[65, 64]], np.int8)) == pytest.approx(3 / 4)
    assert x86_pair_risk(np.array([[-64, -64, -65]], np.int8)) == pytest.approx(enumerated([-64, -64, -65]))


def test_x86_axis():
    weights = RNG.integers(-127, 128, (4, 6)).astype(np.int8)
    assert x86_pair_risk(weights, axis=1) == pytest.approx(x86_pair_risk(weights.T))


def test_arm():
    assert arm_pair_risk(np.array([-127, 127, 0], np.int8)) == 0
    assert arm_pair_risk(np.array([-128, 127, 0, 0], np.int8)) == 0.25


def test_x86_excess_is_the_enumeration_and_one_at_the_limit():
    rows = RNG.integers(-127, 128, (6, 8)).astype(np.int8)
    for row, found in zip(rows, x86_excess(rows, 4), strict=True):
        sums = [
            a * int(u) + b * int(v)
            for u, v in zip(row[::2], row[1::2], strict=True)
            for a in (0, 255)
            for b in (0, 255)
        ]
        assert found == pytest.approx(max(max(sums) / 32767, min(sums) / -32768))
    assert x86_excess(np.array([[64, 64]]), 2)[0] <= 1 < x86_excess(np.array([[65, 64]]), 2)[0]


def test_an_odd_number_of_channels_has_pairs_anywhere():
    rows = np.array([[1, 100, 100, 1, 0, 0]])
    assert x86_excess(rows, 2)[0] < 1 < x86_excess(rows, 3)[0]


def test_kernel_order_has_channels_fastest():
    weights = np.arange(12).reshape(1, 3, 2, 2)
    assert in_kernel_order(weights).tolist() == [[0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]]
