"""Extrapolated extremes, against Gumbel's law and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.numerics.extremes import LEAST_SAMPLES, Extremes


def _of(values: np.ndarray) -> Extremes:
    result = Extremes()
    for value in values:
        result.add(float(value))
    return result


def test_level_of_samples_from_gumbels_law_is_that_laws_quantile() -> None:
    """Location 5, scale 2: one in 300 goes beyond 5 - 2 ln(-ln(1 - 1/300)) = 16.4."""
    values = np.random.default_rng(0).gumbel(5, 2, size=20000)
    assert _of(values).level(300) == pytest.approx(5 - 2 * math.log(-math.log(1 - 1 / 300)), rel=0.02)


def test_equal_samples_need_no_room() -> None:
    assert _of(np.full(20, 6.0)).level(300) == pytest.approx(6.0)


def test_few_samples_tell_nothing() -> None:
    assert _of(np.arange(LEAST_SAMPLES - 1)).level(300) == -math.inf


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3), min_size=LEAST_SAMPLES, max_size=40), st.floats(0.1, 10), st.floats(-9, 9)
)
def test_level_follows_scale_and_shift(values: list[float], factor: float, shift: float) -> None:
    plain = _of(np.array(values)).level(100)
    moved = _of(np.array(values) * factor + shift).level(100)
    assert moved == pytest.approx(plain * factor + shift, rel=1e-6, abs=1e-6)
