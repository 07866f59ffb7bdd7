"""Affine quantization against numbers computed by hand, and properties that must hold for any range."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.numerics import affine
from edgecomp.spec import QuantSpec, TensorQuantization

INT8 = QuantSpec()
WEIGHT = QuantSpec(symmetric=True, axis=0, narrow=True)
WIDE = QuantSpec(bits=16, symmetric=True, narrow=True)
numbers = st.floats(-1e6, 1e6, width=32)


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (0.0, 255.0, 1.0, -128),
        (-128.0, 127.0, 1.0, 0),
        (-1.0, 1.0, 2 / 255, 0),  # -128 + 127.5 = -0.5, half to even
        (-255.0, 0.0, 1.0, 127),
        (2.0, 25.5, 0.1, -128),  # widened to hold zero
        (-51.0, -3.0, 0.2, 127),
        (-10.0, 245.0, 1.0, -118),
    ],
)
def test_asymmetric_range(low: float, high: float, scale: float, zero_point: int) -> None:
    found = affine.from_range(low, high, INT8)
    assert found.scale.dtype == np.float32 and found.zero_point.dtype == np.int32
    assert float(found.scale) == np.float32(scale)
    assert int(found.zero_point) == zero_point


def test_symmetric_range() -> None:
    assert float(affine.from_range(-2.0, 1.0, QuantSpec(symmetric=True)).scale) == np.float32(2 / 127)
    assert float(affine.from_range(-3.2767, 1.0, WIDE).scale) == np.float32(0.0001)


def test_a_range_of_zero_still_divides() -> None:
    found = affine.from_range(0.0, 0.0, INT8)
    assert float(found.scale) == np.float32(1.0 / 255.0)
    assert affine.dequantize(affine.quantize(np.zeros(3, np.float32), found), found).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_a_range_that_is_none_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="expected finite values with low <= high"):
        affine.from_range(low, high, INT8)


def test_quantize_rounds_half_to_even_and_clips() -> None:
    q = TensorQuantization(INT8, np.float32(0.5).reshape(()), np.array(10, np.int32))
    x = np.array([0.25, 0.75, -0.25, 1.0, 100.0, -100.0], np.float32)  # 0.5, 1.5, -0.5 steps and so on
    assert affine.quantize(x, q).tolist() == [10, 12, 10, 12, 127, -128]
    assert affine.dequantize(np.array([10, 12, -128], np.int8), q).tolist() == [0.0, 1.0, -69.0]


def test_channel_scales_and_weights() -> None:
    weight = np.array([[1.27, -0.635], [0.0, 0.0], [-2.54, 1.0]], np.float32)
    scales = affine.channel_scales(weight, WEIGHT)
    np.testing.assert_allclose(scales, [0.01, 2.0**-40, 0.02], rtol=1e-6)
    q = TensorQuantization(WEIGHT, scales, np.zeros(3, np.int32))
    # -0.635 / 0.01 is -63.5 up to float32; the narrow range keeps -128 out.
    assert affine.quantize(weight, q)[[0, 1, 2], [0, 0, 0]].tolist() == [127, 0, -127]
    per_tensor = QuantSpec(symmetric=True, narrow=True)
    assert float(affine.channel_scales(weight, per_tensor)) == pytest.approx(0.02)


def test_channel_axis_of_a_transposed_convolution() -> None:
    weight = np.zeros((2, 3, 1, 1), np.float32)
    weight[:, :, 0, 0] = [[1.27, 0.0, 2.54], [-2.54, 0.127, 0.0]]
    spec = QuantSpec(symmetric=True, axis=1, narrow=True)
    np.testing.assert_allclose(affine.channel_scales(weight, spec), [0.02, 0.001, 0.02], rtol=1e-6)


def test_bias_is_rounded_in_steps_of_input_times_weight_scale() -> None:
    source, weight = np.array(0.5, np.float32), np.array([0.25, 2.0], np.float32)
    assert affine.bias_scales(source, weight).tolist() == [0.125, 1.0]
    assert affine.quantize_bias(np.array([1.0, -2.5]), source, weight).tolist() == [8, -2]


def test_a_dead_channel_gets_a_scale_that_its_bias_fits() -> None:
    """3.0 / (0.1 * s) = 2^30 at s = 3 / (0.1 * 2^30); the other channel's scale is large enough."""
    found = affine.floor_for_bias(
        np.array([2.0**-40, 0.5], np.float32), np.array([3.0, 3.0], np.float32), np.array(0.1, np.float32)
    )
    np.testing.assert_allclose(found, [3.0 / (0.1 * 2**30), 0.5], rtol=1e-6)
    integers = affine.quantize_bias(np.array([3.0, 3.0]), np.array(0.1, np.float32), found)
    assert abs(int(integers[0]) - 2**30) < 2**8 and int(integers[1]) == 60


def test_along() -> None:
    scales = np.array([1.0, 2.0])
    assert affine.along(scales, 1, 4).shape == (1, 2, 1, 1)
    assert affine.along(scales, None, 4) is scales
    assert affine.along(np.array(1.0), 0, 4).shape == ()


@given(low=numbers, width=st.floats(0, 1e6, width=32), bits=st.sampled_from([8, 16]))
def test_zero_is_exact_and_the_error_is_half_a_step(low: float, width: float, bits: int) -> None:
    high = low + width
    spec = QuantSpec() if bits == 8 else WIDE
    q = affine.from_range(low, high, spec)
    zero = affine.dequantize(affine.quantize(np.zeros(1, np.float32), q), q)
    assert zero[0] == 0.0
    x = np.linspace(min(low, 0.0), max(high, 0.0), 101).astype(np.float32)
    error = np.abs(affine.dequantize(affine.quantize(x, q), q) - x)
    # At either end the rounded zero point may cost another half step.
    assert error.max() <= float(q.scale) * 1.001 + 1e-30
    inner = error[(affine.quantize(x, q) > spec.qmin) & (affine.quantize(x, q) < spec.qmax)]
    assert inner.size == 0 or inner.max() <= float(q.scale) * 0.51


@given(st.lists(numbers, min_size=1, max_size=20), st.floats(2.0**-20, 1e3, width=32), st.integers(-128, 127))
def test_quantizing_again_changes_nothing(values: list[float], scale: float, zero_point: int) -> None:
    q = TensorQuantization(INT8, np.float32(scale).reshape(()), np.array(zero_point, np.int32))
    once = affine.quantize(np.array(values, np.float32), q)
    assert np.array_equal(affine.quantize(affine.dequantize(once, q), q), once)
    assert once.min() >= -128 and once.max() <= 127


@settings(max_examples=50)
@given(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4))
def test_weights_stay_in_the_narrow_range(values: list[float]) -> None:
    weight = np.array(values, np.float32).reshape(2, 2)
    scales = affine.channel_scales(weight, WEIGHT)
    q = TensorQuantization(WEIGHT, scales, np.zeros(2, np.int32))
    integers = affine.quantize(weight, q)
    assert np.abs(integers).max() <= 127
    assert np.abs(affine.dequantize(integers, q) - weight).max() <= scales.max() * 0.51
