"""Affine quantization: real = (q - zero_point) * scale.

Source of the scheme: Jacob et al., CVPR 2018, section 2.1, and TensorFlow Lite's 8-bit quantization
specification (activations int8 asymmetric, weights int8 symmetric in [-127, 127], bias int32).
"""

from __future__ import annotations

import numpy as np

from edgecomp.numerics import groupwise
from edgecomp.spec import QuantSpec, TensorQuantization

SMALLEST_SCALE = 2.0**-40
"""Floor of every scale: an all-zero tensor still gets a scale that float32 can divide by."""

_LARGEST_BIAS = float(2**30)
"""Bias integers are kept below this, so that an int32 accumulator has room for the products."""


def from_range(low: float, high: float, spec: QuantSpec) -> TensorQuantization:
    """Scale and zero point for a range [low, high], widened to hold zero exactly.

    >>> q = from_range(0.0, 6.0, QuantSpec(bits=8))
    >>> float(q.scale), int(q.zero_point)
    (0.023529412224888802, -128)
    """
    if not (np.isfinite(low) and np.isfinite(high)) or low > high:
        raise ValueError(f"range is [{low}, {high}]; expected finite values with low <= high")
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        high = 1.0  # always zero: any scale is exact, and kernels refuse or abort on a tiny one
    if spec.symmetric:
        scale = max(-low, high) / spec.qmax
        return _per_tensor(scale, 0, spec)
    scale = max((high - low) / (spec.qmax - spec.qmin), SMALLEST_SCALE)
    zero_point = int(np.clip(np.rint(spec.qmin - low / scale), spec.qmin, spec.qmax))
    return _per_tensor(scale, zero_point, spec)


def _per_tensor(scale: float, zero_point: int, spec: QuantSpec) -> TensorQuantization:
    return TensorQuantization(
        spec, np.array(max(scale, SMALLEST_SCALE), np.float32), np.array(zero_point, np.int32)
    )


def fixed(scale: float, zero_point: int, spec: QuantSpec) -> TensorQuantization:
    """A quantization that a function's range prescribes, such as softmax: 1/256, -128."""
    return _per_tensor(scale, zero_point, spec)


def channel_scales(weight: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """Symmetric min-max scales, shape [channels] along `spec.axis`, or [] per tensor; float32."""
    magnitude = np.abs(weight.astype(np.float64))
    if spec.axis is None:
        largest = magnitude.max(initial=0.0)
    else:
        largest = magnitude.max(axis=tuple(a for a in range(weight.ndim) if a != spec.axis), initial=0.0)
    return np.maximum(largest / spec.qmax, SMALLEST_SCALE).astype(np.float32)


def along(values: np.ndarray, axis: int | None, ndim: int) -> np.ndarray:
    """[channels] -> a shape that broadcasts along `axis` of an `ndim`-dimensional tensor."""
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def quantize(x: np.ndarray, q: TensorQuantization) -> np.ndarray:
    """Float array -> integers (int32), rounded half to even and clipped to the range of `q.spec`."""
    scale = along(q.scale, q.spec.axis, x.ndim).astype(np.float32)
    zero = along(q.zero_point, q.spec.axis, x.ndim)
    return np.clip(np.rint(x.astype(np.float32) / scale) + zero, q.spec.qmin, q.spec.qmax).astype(np.int32)


def dequantize(values: np.ndarray, q: TensorQuantization) -> np.ndarray:
    """Integers -> float32. Weights in groups have a scale for each group of inputs [out, groups]."""
    if q.spec.group_size is not None:
        return groupwise.restore(values, q.scale, q.zero_point)
    scale = along(q.scale, q.spec.axis, values.ndim).astype(np.float32)
    zero = along(q.zero_point, q.spec.axis, values.ndim)
    return (values.astype(np.float32) - zero.astype(np.float32)) * scale


def bias_scales(input_scale: np.ndarray, weight_scale: np.ndarray) -> np.ndarray:
    """float32 scale of the int32 bias: the product of input and weight scales."""
    return (input_scale.astype(np.float32) * weight_scale.astype(np.float32)).astype(np.float32)


def quantize_bias(bias: np.ndarray, input_scale: np.ndarray, weight_scale: np.ndarray) -> np.ndarray:
    """Bias [channels] -> int32 [channels] (as int64 values; callers choose the width)."""
    scale = input_scale.astype(np.float64) * weight_scale.astype(np.float64)
    return np.rint(bias.astype(np.float64) / scale).astype(np.int64)


def floor_for_bias(weight_scale: np.ndarray, bias: np.ndarray, input_scale: np.ndarray) -> np.ndarray:
    """Raise the scales of near-dead channels until their bias fits an int32 accumulator.

    A filter of (almost) zeros with a bias of 3.0 would otherwise get a scale near 1e-11 and a bias integer
    that overflows; its weights become 0 at the raised scale, which is what they are.
    """
    smallest = np.abs(bias.astype(np.float64)) / (input_scale.astype(np.float64) * _LARGEST_BIAS)
    return np.maximum(weight_scale, smallest).astype(np.float32)
