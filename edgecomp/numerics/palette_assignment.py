"""Which palette entry a weight takes, with the layer's inputs in view: GPTQ on palettes.

Source: Frantar et al., ICLR 2023, algorithm 1, with the nearest entry of the weight's palette in the place of
the nearest step of a uniform grid: columns in order of falling second moment of their input, each column's
error spread over the later ones by the inverse Hessian.

Shapes: weights [groups, out, d], Hessians (mean x x^T of inputs) [groups, d, d], palettes [groups, out, n].
"""

from __future__ import annotations

import numpy as np

from edgecomp.numerics import gptq


def assign(weight: np.ndarray, hessian: np.ndarray, palettes: np.ndarray) -> np.ndarray:
    """Weights of the same shape, every one an entry of its row's palette (ascending), float64."""
    entries = palettes.astype(np.float64)
    return gptq.sweep(weight, hessian, lambda column: nearest(column, entries))


def nearest(values: np.ndarray, palettes: np.ndarray) -> np.ndarray:
    """The nearest entry of each row's palette for values [groups, out]; of two, the smaller."""
    middles = (palettes[..., 1:] + palettes[..., :-1]) / 2
    index = (values[..., None] > middles).sum(-1)
    return np.take_along_axis(palettes, index[..., None], axis=-1)[..., 0]


def output_error(weight: np.ndarray, chosen: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Mean squared error of each output, e H e^T, [groups, out]."""
    error = weight - chosen
    return np.einsum("god,god->go", error @ hessian, error)
