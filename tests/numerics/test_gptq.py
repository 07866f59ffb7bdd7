"""Second-order rounding: worked out by hand, and against rounding to nearest on the same inputs."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.numerics import gptq


def _cost(weight: np.ndarray, integers: np.ndarray, scale: np.ndarray, hessian: np.ndarray) -> float:
    error = weight - integers * scale[:, :, None]
    return float(np.einsum("god,gde,goe->", error, hessian, error))


def test_uncorrelated_inputs_round_to_nearest() -> None:
    weight = np.array([[[0.24, -0.76, 1.26]]])
    hessian = np.diag([3.0, 1.0, 2.0])[None]
    integers = gptq.round_weights(weight, hessian, np.array([[0.5]]), 7)
    assert integers.tolist() == [[[0, -2, 3]]]


def test_two_equal_inputs_share_one_error() -> None:
    """Inputs that are always equal see only the sum of their weights: 0.4 + 0.4 is 1, not 0."""
    weight = np.array([[[0.4, 0.4]]])
    hessian = np.ones((1, 2, 2))
    integers = gptq.round_weights(weight, hessian, np.array([[1.0]]), 7)
    assert integers.sum() == 1
    assert gptq.nearest(weight, np.array([[1.0]]), 7).sum() == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(2, 150))
def test_never_much_worse_than_nearest_and_on_the_grid(seed: int, groups: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((groups, d, 2 * d)) + rng.standard_normal((groups, d, 1))
    hessian = inputs @ inputs.transpose(0, 2, 1) / (2 * d)
    weight = rng.standard_normal((groups, 4, d))
    scale = np.abs(weight).max(axis=2) / 7
    integers = gptq.round_weights(weight, hessian, scale, 7)
    assert np.abs(integers).max() <= 7
    plain = gptq.nearest(weight, scale, 7)
    assert _cost(weight, integers, scale, hessian) <= 1.05 * _cost(weight, plain, scale, hessian)


def test_correlated_inputs_gain_clearly() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((1, 64, 512)) + 2.0 * rng.standard_normal((1, 1, 512))
    hessian = inputs @ inputs.transpose(0, 2, 1) / 512
    weight = rng.standard_normal((1, 16, 64))
    scale = np.abs(weight).max(axis=2) / 7
    ours = _cost(weight, gptq.round_weights(weight, hessian, scale, 7), scale, hessian)
    assert ours < 0.5 * _cost(weight, gptq.nearest(weight, scale, 7), scale, hessian)


def test_clipping_pays_where_one_weight_is_an_outlier_on_a_silent_input() -> None:
    """The outlier's input is always 0, so clipping it costs nothing and the others get finer steps."""
    weight = np.array([[[8.0, 0.55, -0.35, 0.15]]])
    hessian = np.diag([0.0, 1.0, 1.0, 1.0])[None]
    scale = gptq.clipped_scales(weight, hessian, 7, (0.1, 0.5, 1.0))
    assert np.isclose(scale.item(), 0.8 / 7)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 150))
def test_upper_factor_is_the_cholesky_factor_of_the_inverse(seed: int, groups: int, d: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(groups, d, d + 5))
    hessian = gptq.damped(rows @ rows.transpose(0, 2, 1))
    factor = gptq.upper_factor(hessian)
    assert np.array_equal(factor, np.triu(factor))
    assert (np.diagonal(factor, axis1=1, axis2=2) > 0).all()
    product = factor.transpose(0, 2, 1) @ factor @ hessian
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(d), product.shape), atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(2, 40))
def test_descent_never_loses_and_stays_on_the_grid(seed: int, groups: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((groups, d, 2 * d)) + 2 * rng.standard_normal((groups, 1, 2 * d))
    hessian = inputs @ inputs.transpose(0, 2, 1) / (2 * d)
    weight = rng.standard_normal((groups, 4, d))
    scale = np.abs(weight).max(axis=2) / 7
    start = gptq.round_weights(weight, hessian, scale, 7)
    found = gptq.descend(weight, start, hessian, scale, 7)
    assert np.abs(found).max() <= 7
    assert _cost(weight, found, scale, hessian) <= _cost(weight, start, scale, hessian) * (1 + 1e-5) + 1e-9


def test_descent_mends_what_rounding_to_nearest_did() -> None:
    """Equal inputs see the sum of four weights of 0.4, which is 1.6: two of them go up."""
    weight, hessian, scale = np.full((1, 1, 4), 0.4), np.ones((1, 4, 4)), np.array([[1.0]])
    found = gptq.descend(weight, np.zeros((1, 1, 4), np.int32), hessian, scale, 7)
    assert found.sum() == 2


def test_a_scale_at_which_all_weights_lie_on_the_grid_is_found() -> None:
    """0.5 and 1.05 in steps of 0.5 err by 0.05; of 0.5125 by 0.0125 and 0.025; of 0.525 by 0.025 only."""
    weight, moments = np.array([[[0.5, 1.05]]]), np.eye(2)[None]
    scale = gptq.aligned_scales(weight, moments, np.array([[0.5]]), 7, (1.0, 1.025, 1.05))
    assert np.isclose(scale.item(), 0.525)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(2, 9))
def test_aligned_scales_never_err_more(seed: int, groups: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((groups, d, 40)) + rng.standard_normal((groups, 1, 40))
    moments = gptq.damped(inputs @ inputs.transpose(0, 2, 1) / 40)
    weight = rng.standard_normal((groups, 2, d))
    given_scale = np.abs(weight).max(axis=2) / 127
    found = gptq.aligned_scales(weight, moments, given_scale, 127)
    before = _cost(weight, gptq.round_weights(weight, moments, given_scale, 127), given_scale, moments)
    after = _cost(weight, gptq.round_weights(weight, moments, found, 127), found, moments)
    assert after <= before * 1.02
    assert (np.abs(np.log(found / given_scale)) < 0.11).all()
