"""Which layers can overflow the 16-bit sums of 8-bit kernels: x86 without VNNI, Arm without dot products."""

from __future__ import annotations

import numpy as np

_LARGEST_INT16 = 32767
_LARGEST_UINT8 = 255


def x86_pair_risk(weights: np.ndarray, axis: int = 0) -> float:
    """Share of weight pairs of an output channel whose products with two 8-bit activations can exceed int16.

    `weights`: int8, output channels along `axis`. Without VNNI, `vpmaddubsw` multiplies unsigned activations
    by signed weights and adds neighbouring products in 16 bits, saturating (Intel SDM, vol. 2, PMADDUBSW).
    a1 w1 + a2 w2 with a up to 255 leaves int16 when |w1 + w2| >= 129, which two weights of unlike sign cannot
    reach. Pairs are taken as if drawn at random from the channel: kernels order them each in their own way.
    Weights of 7 bits, |w| <= 64, give 0. Example: a channel of [127, 127, 1, 1] has 4 of 16 ordered pairs at
    risk: 0.25.
    """
    rows = np.moveaxis(np.asarray(weights), axis, 0).reshape(weights.shape[axis], -1).astype(np.int64)
    limit = _LARGEST_INT16 // _LARGEST_UINT8 + 1
    sums = np.arange(-256, 255)
    risks = []
    for row in rows:
        counts = np.bincount(row + 128, minlength=256).astype(np.float64) / row.size
        risks.append(float(np.convolve(counts, counts)[np.abs(sums) >= limit].sum()))
    return float(np.mean(risks))


def in_kernel_order(weights: np.ndarray) -> np.ndarray:
    """[out, in, *kernel] -> [out, K] as ONNX Runtime's kernels go through it: channels fastest."""
    return np.moveaxis(weights, 1, -1).reshape(weights.shape[0], -1)


def x86_excess(rows: np.ndarray, channels: int) -> np.ndarray:
    """For each output [out], the largest sum of two neighbouring products over what int16 holds.

    Above 1 the kernel can saturate, at 1 or below it cannot, whatever the activations (0 to 255) are. `rows`:
    integer weights [out, K] in kernel order. `channels`: input channels; kernels take them in pairs, and
    where their number is odd pairs may begin anywhere.

    >>> x86_excess(np.array([[127, 1, -127, 127], [127, 127, 0, 0]]), 4).round(2).tolist()
    [1.0, 1.98]
    """
    rows = rows.astype(np.int64) * _LARGEST_UINT8
    step = 2 if channels % 2 == 0 else 1
    first, second = rows[:, :-1:step], rows[:, 1::step]
    largest = (np.maximum(first, 0) + np.maximum(second, 0)).max(1, initial=0)
    smallest = (np.minimum(first, 0) + np.minimum(second, 0)).min(1, initial=0)
    return np.maximum(largest / _LARGEST_INT16, smallest / -(_LARGEST_INT16 + 1))


def arm_pair_risk(weights: np.ndarray) -> float:
    """Share of weights that are -128: only they can overflow SMULL and SMLAL's int16 sum of two products.

    2 * 127 * 128 = 32512 fits, 2 * 128 * 128 = 32768 does not: narrow weights, [-127, 127], are safe.
    """
    return float(np.mean(np.asarray(weights) == -128))
