"""Values that make no sense fail where they are made; the door between float arrays and an artifact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecomp import door
from edgecomp.errors import DataError
from edgecomp.spec import Preprocessing, QuantSpec, TensorQuantization, TensorSpec


@pytest.mark.parametrize(
    ("bits", "narrow", "ends"), [(8, False, (-128, 127)), (8, True, (-127, 127)), (4, False, (-8, 7))]
)
def test_the_range_of_the_integers(bits: int, narrow: bool, ends: tuple[int, int]) -> None:
    spec = QuantSpec(bits=bits, narrow=narrow)
    assert (spec.qmin, spec.qmax) == ends


@pytest.mark.parametrize("bits", [0, 1, 5, 7, 64])
def test_a_width_that_no_format_has_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        QuantSpec(bits=bits)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_must_be_finite_and_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="finite and positive"):
        TensorQuantization(QuantSpec(), np.array(scale, np.float32), np.array(0, np.int32))


def test_a_shape_must_be_positive_and_a_scale_has_a_zero_point() -> None:
    with pytest.raises(ValueError, match="every dimension"):
        TensorSpec("x", (1, 0))
    with pytest.raises(ValueError, match="both scale and zero_point"):
        TensorSpec("x", (1,), "int8", scale=0.5)
    with pytest.raises(TypeError):
        TensorSpec("x", (1,), "int7")


def test_the_exact_range_of_a_picture() -> None:
    # (0 - 127) / 128 and (255 - 127) / 128
    lite = Preprocessing(rescale=1.0, mean=(127.0,) * 3, std=(128.0,) * 3)
    assert lite.exact_range() == (-0.9921875, 1.0)
    two = Preprocessing(mean=(0.5, 0.25), std=(0.5, 0.25))
    assert two.exact_range() == (-1.0, 3.0)


def test_preprocessing_comes_back_from_json() -> None:
    chosen = Preprocessing(size=(224, 224), resize=256, mean=(0.485,), std=(0.229,), kernel="bicubic")
    facts = {k: list(v) if isinstance(v, tuple) else v for k, v in chosen.to_json().items()}
    assert Preprocessing.from_json(facts) == chosen


def test_a_quantized_door_rounds_half_to_even_and_clips() -> None:
    spec = TensorSpec("x", (1, 6), "int8", "", 0.5, 10)
    values = np.array([[0.25, 0.75, -0.25, 1000.0, -1000.0, 0.0]], np.float32)
    # x / 0.5 = 0.5, 1.5, -0.5, ... -> 0, 2, 0 by half to even; + 10
    assert door.into(values, spec).tolist() == [[10, 12, 10, 127, -128, 10]]
    assert door.into(values, spec).dtype == np.int8


def test_the_layout_changes_at_the_door() -> None:
    pictures = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    spec = TensorSpec("x", (1, 3, 4, 2), "float32", "NHWC")
    stored = door.into(pictures, spec)
    assert stored[0, 1, 2, 1] == pictures[0, 1, 1, 2]
    assert np.array_equal(door.out_of(stored, spec), pictures)


def test_a_shape_that_does_not_fit_is_named() -> None:
    with pytest.raises(DataError, match=r"'x' has shape \(1, 3\); the artifact expects \(1, 4\)"):
        door.into(np.zeros((1, 3), np.float32), TensorSpec("x", (1, 4)))


@given(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=20), st.integers(-100, 100))
def test_there_and_back_is_within_half_a_step(values: list[float], zero_point: int) -> None:
    spec = TensorSpec("x", (1, len(values)), "int16", "", 0.25, zero_point)
    array = np.array([values], np.float32)
    assert np.abs(door.out_of(door.into(array, spec), spec) - array).max() <= 0.125 + 1e-6


class TwoAtATime:
    """A session whose artifact takes two samples and gives their sums."""

    inputs = (TensorSpec("x", (2, 3)),)
    outputs = (TensorSpec("y", (2, 1)),)

    def run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [arrays[0].sum(axis=1, keepdims=True)]

    def placement(self) -> list[object]:
        return []


def test_a_batch_runs_a_slice_at_a_time() -> None:
    batch = np.arange(18, dtype=np.float32).reshape(6, 3)
    (found,) = door.run_float(TwoAtATime(), [batch])  # type: ignore[arg-type]
    assert found[:, 0].tolist() == [3, 12, 21, 30, 39, 48]
    with pytest.raises(DataError, match="5 samples do not divide"):
        door.run_float(TwoAtATime(), [batch[:5]])  # type: ignore[arg-type]


def test_one_std_serves_all_channels_but_two_do_not_serve_three() -> None:
    assert Preprocessing(mean=(0.0, 0.5), std=(0.5,)).exact_range() == (-1.0, 2.0)
    with pytest.raises(ValueError, match="mean has 3 values, std 2: give both alike, or one"):
        Preprocessing(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0))
