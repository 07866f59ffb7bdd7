"""Which numbers a TFLite target stores: dtype of weights and activations, and how a plan becomes `Quant`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgecomp.exporters.tflite_file import Quant
from edgecomp.numerics import affine
from edgecomp.spec import TensorQuantization

Storage = Literal["float32", "float16", "int8", "int4"]


@dataclass(frozen=True)
class Numerics:
    """`weights`: storage of weights where activations are float. `integer`: activations follow the plan.

    `activation_bits`: what some of the plan's activations must have for an integer target; the rest may
    have 8 or 16. `group_size`: inputs that share a scale where 4-bit weights are rounded here. `restored`:
    integer weights become float32 when the file is loaded, and activations stay float.
    """

    weights: Storage = "float32"
    integer: bool = False
    activation_bits: int = 8
    group_size: int = 32
    restored: bool = False


TARGETS: dict[str, Numerics] = {
    "tflite-fp32": Numerics(),
    "tflite-fp16": Numerics(weights="float16"),
    "tflite-dynamic": Numerics(weights="int8"),
    "tflite-int4": Numerics(weights="int4"),
    "tflite-int8": Numerics(integer=True),
    "tflite-int16x8": Numerics(integer=True, activation_bits=16),
}

# Prescribed outputs: TFLite's quantization specification, 8 bits; the 16x8 kernels', 16 bits.
FIXED: dict[tuple[str, str], Quant] = {
    ("SOFTMAX", "int8"): Quant.of(1.0 / 256.0, -128),
    ("LOGISTIC", "int8"): Quant.of(1.0 / 256.0, -128),
    ("TANH", "int8"): Quant.of(1.0 / 128.0, 0),
    ("LOG_SOFTMAX", "int8"): Quant.of(16.0 / 256.0, 127),
    ("SOFTMAX", "int16"): Quant.of(1.0 / 32768.0, 0, "int16"),
    ("LOGISTIC", "int16"): Quant.of(1.0 / 32768.0, 0, "int16"),
    ("TANH", "int16"): Quant.of(1.0 / 32768.0, 0, "int16"),
}


_FINER = 128
"""int16 steps in an int8 step: 255 * 128 is the most that an int8 value less its zero point needs."""
_BETWEEN = _FINER + 0.25
"""The same for results, which QUANTIZE narrows: it multiplies by 1 / steps, rounds to parts of an int8 step,
to a 64th with 128 steps or less and a 128th with more, then rounds again. (n + 1/2) * 128.25 is never a whole
number, so that no int16 value lies halfway between two int8 ones."""


def quant(q: TensorQuantization) -> Quant:
    """The plan's numbers of an activation as they are."""
    dtype = "int16" if q.spec.bits == 16 else "int8"
    return Quant(q.scale.reshape(1).astype(np.float32), q.zero_point.reshape(1).astype(np.int64), dtype=dtype)


def widened(q: Quant) -> Quant:
    """An int16 scale that holds every value of an int8 one exactly: a 128th of it, zero point 0."""
    return Quant.of(float(q.scale[0] / np.float32(_FINER)), 0, "int16")


def narrowing(q: Quant) -> Quant:
    """An int16 scale for results that QUANTIZE then rounds to an int8 one; it covers the int8 range."""
    return Quant.of(float(q.scale[0] / np.float32(_BETWEEN)), 0, "int16")


def widened_integers(array: np.ndarray, q: Quant) -> np.ndarray:
    """int8 integers on the scale that `widened` gives."""
    return ((array.astype(np.int64) - q.zero_point[0]) * _FINER).astype(np.int16)


def exact(value: float, dtype: str) -> tuple[int, Quant]:
    """An integer and a scale whose product is `value`: how a number of the model becomes an operand."""
    limit = np.iinfo(dtype).max
    if value == 0:
        return 0, Quant.of(1.0 / limit, 0, dtype)
    return (limit if value > 0 else -limit), Quant.of(abs(value) / limit, 0, dtype)


def quantized(array: np.ndarray, q: Quant, dtype: str) -> np.ndarray:
    """Per-tensor quantization of a constant, rounded half to even as everywhere."""
    limits = np.iinfo(dtype)
    with np.errstate(all="ignore"):
        scaled = np.rint(array.astype(np.float32) / q.scale[0]) + np.float32(q.zero_point[0])
    return np.clip(scaled, limits.min, limits.max).astype(dtype)


def bias_integers(bias: np.ndarray, input_scale: np.ndarray, weight_scale: np.ndarray) -> np.ndarray:
    """Bias on the accumulator's scale, int64 [channels]."""
    return affine.quantize_bias(bias, input_scale.reshape(-1)[:1], weight_scale)
