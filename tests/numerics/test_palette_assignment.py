"""Assignment to palettes with the inputs in view: against brute force, and against plain rounding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgecomp.numerics import gptq, palette_assignment, palettes


def layer(
    groups: int, out: int, d: int, entries: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight, second moments of correlated inputs, and a palette for each row."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(groups, out, d))
    inputs = rng.normal(size=(groups, 4 * d, d)) @ rng.normal(size=(groups, d, d))
    lut = palettes.fit(weight.reshape(groups * out, d).astype(np.float32), entries).lut
    return weight, inputs.transpose(0, 2, 1) @ inputs / (4 * d), lut.reshape(groups, out, entries)


def test_every_weight_is_an_entry_of_its_rows_palette() -> None:
    weight, hessian, lut = layer(2, 5, 130, 4)
    chosen = palette_assignment.assign(weight, hessian, lut)
    assert chosen.shape == weight.shape
    for g, o in itertools.product(range(2), range(5)):
        assert set(chosen[g, o]) <= set(lut[g, o].astype(np.float64))


@pytest.mark.parametrize("shape", [(1, 16, 64, 16), (3, 4, 100, 8)])
def test_the_error_of_the_output_is_less_than_that_of_nearest_entries(shape: tuple[int, ...]) -> None:
    weight, hessian, lut = layer(*shape)
    plain = np.stack([palette_assignment.nearest(weight[:, :, j], lut) for j in range(shape[2])], 2)
    chosen = palette_assignment.assign(weight, hessian, lut)
    errors = [palette_assignment.output_error(weight, w, hessian).sum() for w in (chosen, plain)]
    assert errors[0] < 0.85 * errors[1]


def test_it_comes_near_to_the_best_of_all_assignments() -> None:
    """Six weights and two entries: all 64 assignments are tried."""
    ratios = []
    for seed in range(20):
        weight, hessian, lut = layer(1, 1, 6, 2, seed)
        every = np.array(list(itertools.product(*[lut[0, 0]] * 6)))
        errors = np.einsum("nd,de,ne->n", weight[0] - every, hessian[0], weight[0] - every)
        chosen = palette_assignment.assign(weight, hessian, lut)
        ratios.append(palette_assignment.output_error(weight, chosen, hessian)[0, 0] / errors.min())
    assert np.median(ratios) < 1.5 and min(ratios) >= 1 - 1e-9


def test_an_even_grid_is_gptq() -> None:
    """Palettes of -7 .. 7 steps are the uniform grid that GPTQ rounds to."""
    weight, hessian, _ = layer(1, 6, 32, 4)
    scale = np.abs(weight).max(2) / 7
    lut = np.arange(-7, 8) * scale[:, :, None]
    steps = gptq.round_weights(weight, hessian, scale, 7)
    np.testing.assert_allclose(palette_assignment.assign(weight, hessian, lut), steps * scale[:, :, None])


def test_uncorrelated_inputs_give_nearest_entries() -> None:
    weight, _, lut = layer(1, 3, 10, 4)
    hessian = np.eye(10)[None]
    expected = np.stack([palette_assignment.nearest(weight[:, :, j], lut) for j in range(10)], 2)
    np.testing.assert_array_equal(palette_assignment.assign(weight, hessian, lut), expected)
