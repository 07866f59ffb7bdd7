"""Weights in groups: against numbers worked out by hand, and against exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgecomp.numerics import affine, group_gptq, groupwise, hqq
from edgecomp.numerics.groupwise import Grid

FOUR = Grid(4, symmetric=True, group=4)


def test_the_docstring_example() -> None:
    weight = np.array([[-0.8, 0.1, 0.3, 0.7]], np.float32)
    scale, zero = groupwise.searched(weight, FOUR)
    np.testing.assert_allclose(scale, [[0.1]], rtol=1e-3)
    np.testing.assert_array_equal(zero, [[0]])
    np.testing.assert_array_equal(groupwise.round_to(weight, scale, zero, FOUR), [[-8, 1, 3, 7]])


def test_an_asymmetric_group_of_positive_numbers_uses_all_sixteen_steps() -> None:
    weight = np.linspace(0, 1.5, 16, dtype=np.float32)[None]
    grid = Grid(4, symmetric=False, group=16)
    scale, zero = groupwise.searched(weight, grid)
    np.testing.assert_allclose(scale, [[0.1]], rtol=1e-3)
    np.testing.assert_array_equal(zero, [[-8]])
    np.testing.assert_array_equal(groupwise.round_to(weight, scale, zero, grid)[0], np.arange(-8, 8))


@pytest.mark.parametrize(
    "inputs, wanted, size",
    [(128, 32, 32), (576, 128, 64), (80, 32, 16), (100, 32, 100), (96, None, 96), (64, 128, 64)],
)
def test_a_group_size_that_does_not_divide_falls_back(inputs: int, wanted: int | None, size: int) -> None:
    assert groupwise.group_for(inputs, wanted) == size


weights = hnp.arrays(np.float32, (3, 32), elements=st.floats(-4, 4, width=32, allow_subnormal=False))


@settings(deadline=None, max_examples=40)
@given(weights, st.booleans(), st.sampled_from([4, 8]))
def test_scales_are_numbers_of_float16_and_search_is_no_worse_than_the_whole_range(
    weight: np.ndarray, symmetric: bool, bits: int
) -> None:
    grid = Grid(bits, symmetric, 16)
    scale, zero = groupwise.searched(weight, grid)
    np.testing.assert_array_equal(scale, scale.astype(np.float16))
    assert (scale > 0).all() and (zero >= grid.low).all() and (zero <= grid.high).all()
    back = groupwise.restore(groupwise.round_to(weight, scale, zero, grid), scale, zero)
    parts = weight.reshape(3, 2, 16)
    low, high = np.minimum(parts.min(2), 0), np.maximum(parts.max(2), 0)
    step = np.maximum(low / grid.low, high / grid.high) if symmetric else (high - low) / (2**bits - 1)
    # Rounding to nearest on the whole range is off by half a step, and by the float16 of the scale.
    bound = 16 * (step * 0.5 + np.maximum(-low, high) * 2e-3 + 1e-5) ** 2
    assert (np.square(back - weight).reshape(3, 2, 16).sum(2) <= bound * 4).all()


def test_the_plan_restores_what_the_numbers_say() -> None:
    values = np.array([[1, -2, 3, 4]], np.int8)
    q = groupwise.assemble(
        values, np.array([[0.5, 2.0]], np.float32), np.array([[1, 0]]), Grid(4, False, 2), (1, 4)
    )
    np.testing.assert_array_equal(affine.dequantize(values, q), [[0.0, -1.5, 6.0, 8.0]])
    assert groupwise.bits_per_weight(q) == 4 + (16 + 4) * 2 / 4


def test_one_group_becomes_one_scale_a_channel() -> None:
    q = groupwise.assemble(np.ones((2, 4)), np.ones((2, 1)), np.zeros((2, 1)), Grid(4, True, 4), (2, 4))
    assert q.spec.group_size is None and q.scale.shape == (2,)
    scale, _, size = groupwise.in_groups(q)
    assert scale.shape == (2, 1) and size == 4


def test_hqq_forgives_an_outlier_that_squares_do_not() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.1, (64, 32)).astype(np.float32)
    weight[:, 0] = 0.9
    grid = Grid(4, symmetric=True, group=32)
    losses = []
    for scale, zero in (hqq.fitted(weight, grid), groupwise._candidate(weight.min(1, keepdims=True),
                        weight.max(1, keepdims=True), 1.0, grid)):  # fmt: skip
        back = groupwise.restore(groupwise.round_to(weight, scale, zero, grid), scale, zero)
        losses.append(np.abs(back - weight).mean())
    assert losses[0] <= losses[1]


def correlated(inputs: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, inputs)) @ rng.standard_normal((inputs, inputs))
    return x.T @ x / 200


def test_gptq_comes_close_to_the_best_of_all_integers() -> None:
    """Two bits, three inputs: all 64 choices are tried at the scales that GPTQ gives back."""
    rng = np.random.default_rng(1)
    weight, hessian, grid = rng.normal(size=(5, 3)), correlated(3), Grid(2, True, 3)
    values, scale, zero = group_gptq.rounded(weight, hessian, grid)
    found = group_gptq.error(groupwise.restore(values, scale, zero), weight, hessian)
    for row in range(5):
        tries = np.array(list(itertools.product(range(-2, 2), repeat=3)))
        off = weight[row] - tries * scale[row]
        best = np.einsum("ti,ij,tj->t", off, hessian, off).min()
        plain = groupwise.round_to(weight[row : row + 1], scale[row : row + 1], zero[row : row + 1], grid)
        nearest = group_gptq.error(plain * scale[row], weight[row : row + 1], hessian)[0]
        assert best * 0.999 - 1e-6 <= found[row] <= max(nearest, best * 3) + 1e-6


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_loses_less_on_the_inputs_than_searched_clipping(symmetric: bool) -> None:
    rng = np.random.default_rng(2)
    weight, hessian = rng.standard_t(5, (48, 64)) * 0.05, correlated(64)
    grid = Grid(4, symmetric, 32)
    values, scale, zero = group_gptq.rounded(weight, hessian, grid)
    scale2, zero2 = groupwise.searched(weight, grid, np.diag(hessian))
    plain = groupwise.restore(groupwise.round_to(weight, scale2, zero2, grid), scale2, zero2)
    ours = group_gptq.error(groupwise.restore(values, scale, zero), weight, hessian).sum()
    assert ours < 0.5 * group_gptq.error(plain, weight, hessian).sum()
    assert values.min() >= -8 and values.max() <= 7


def test_refitting_scales_never_raises_the_error() -> None:
    rng = np.random.default_rng(3)
    weight, hessian, grid = rng.normal(size=(20, 32)), correlated(32, 4), Grid(4, False, 16)
    errors = []
    for refits in (0, 1, 3):
        found = group_gptq.rounded(weight, hessian, grid, refits)
        errors.append(group_gptq.error(groupwise.restore(*found), weight, hessian))
    assert (errors[1] <= errors[0] + 1e-6).all() and (errors[2] <= errors[1] + 1e-6).all()
