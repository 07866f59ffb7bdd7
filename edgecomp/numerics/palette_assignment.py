"""Which palette entry a weight takes, with the layer's inputs in view: GPTQ on palettes.

Source: Frantar et al., ICLR 2023, algorithm 1, with the nearest entry of the weight's palette in the place of
the nearest step of a uniform grid: columns in order of falling second moment of their input, each column's
error spread over the later ones by the inverse Hessian.

Shapes: weights [groups, out, d], Hessians (mean x x^T of inputs) [groups, d, d], palettes [groups, out, n].
"""

from __future__ import annotations

import numpy as np

from edgecomp.numerics import gptq

_BLOCK = 64


def assign(weight: np.ndarray, hessian: np.ndarray, palettes: np.ndarray) -> np.ndarray:
    """Weights of the same shape, every one an entry of its row's palette (ascending), float64."""
    order = np.argsort(-np.einsum("gii->gi", hessian), axis=1)
    rows = np.arange(len(order))[:, None]
    sorted_weight = np.take_along_axis(weight.astype(np.float64), order[:, None, :], axis=2)
    damped = gptq.damped(hessian)[rows[:, :, None], order[:, :, None], order[:, None, :]]
    chosen = _sweep(sorted_weight, gptq.upper_factor(damped), palettes.astype(np.float64))
    return np.take_along_axis(chosen, np.argsort(order, axis=1)[:, None, :], axis=2)


def nearest(values: np.ndarray, palettes: np.ndarray) -> np.ndarray:
    """The nearest entry of each row's palette for values [groups, out]; of two, the smaller."""
    middles = (palettes[..., 1:] + palettes[..., :-1]) / 2
    index = (values[..., None] > middles).sum(-1)
    return np.take_along_axis(palettes, index[..., None], axis=-1)[..., 0]


def _sweep(weight: np.ndarray, factor: np.ndarray, palettes: np.ndarray) -> np.ndarray:
    """Column by column; within a block errors move at once, beyond it once a block."""
    weight = weight.copy()
    chosen = np.zeros_like(weight)
    d = weight.shape[2]
    for start in range(0, d, _BLOCK):
        stop = min(start + _BLOCK, d)
        errors = np.zeros((*weight.shape[:2], stop - start))
        for j in range(start, stop):
            column = nearest(weight[:, :, j], palettes)
            chosen[:, :, j] = column
            error = (weight[:, :, j] - column) / factor[:, None, j, j]
            weight[:, :, j:stop] -= error[:, :, None] * factor[:, None, j, j:stop]
            errors[:, :, j - start] = error
        weight[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    return chosen


def output_error(weight: np.ndarray, chosen: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Mean squared error of each output, e H e^T, [groups, out]."""
    error = weight - chosen
    return np.einsum("god,god->go", error @ hessian, error)
