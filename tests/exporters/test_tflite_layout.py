"""The layout algebra against NumPy: moving a tuple must equal moving the data."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgecomp.exporters import tflite_layout as layout

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple)


def _stored(array: np.ndarray, perm: layout.Perm) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(perm))


def _in_torch_order(stored: np.ndarray, perm: layout.Perm) -> np.ndarray:
    return stored.transpose(np.argsort(perm))


@st.composite
def _layouts(draw: st.DrawFn) -> tuple[np.ndarray, layout.Perm]:
    shape = draw(SHAPES)
    perm = tuple(draw(st.permutations(range(len(shape)))))
    return np.arange(math.prod(shape)).reshape(shape), perm


def _splits(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """Any shape of `size` elements."""
    shape: list[int] = []
    while size > 1 or (len(shape) < 5 and draw(st.booleans())):
        factor = draw(st.sampled_from([f for f in range(1, size + 1) if size % f == 0])) if size > 1 else 1
        shape.insert(draw(st.integers(0, len(shape))), factor)
        size //= factor
        if len(shape) >= 6:
            shape.append(size)
            break
    return tuple(shape) or (1,)


def test_nchw_is_stored_as_nhwc() -> None:
    assert layout.stored_shape((1, 3, 8, 9), layout.channels_last(4)) == (1, 8, 9, 3)
    assert layout.torch_shape((1, 8, 9, 3), (0, 2, 3, 1)) == (1, 3, 8, 9)
    assert layout.channels_last(2) == (0, 1)


def test_groups_of_a_reshape() -> None:
    assert layout.groups((1, 8, 4, 4), (1, 2, 4, 16)) == [([1], [1, 2]), ([2, 3], [3])]


def test_merging_rows_and_columns_keeps_nhwc() -> None:
    """flatten(2) of NCHW stored as NHWC: [N, C, HW] stored as [N, HW, C]."""
    assert layout.reshaped((1, 6, 4, 4), (0, 2, 3, 1), (1, 6, 16)) == (0, 2, 1)


def test_merging_channels_and_pixels_moves_data() -> None:
    assert layout.reshaped((1, 6, 4, 4), (0, 2, 3, 1), (1, 96)) is None
    assert layout.reshaped((1, 6, 1, 1), (0, 2, 3, 1), (1, 6)) == (0, 1)


@given(_layouts(), st.data())
def test_permute_moves_only_the_layout(case: tuple[np.ndarray, layout.Perm], data: st.DataObject) -> None:
    array, perm = case
    dims = data.draw(st.permutations(range(array.ndim)))
    after = layout.permuted(perm, dims)
    np.testing.assert_array_equal(_in_torch_order(_stored(array, perm), after), array.transpose(dims))


@given(_layouts(), st.data())
def test_movement_is_the_transpose_between_two_layouts(
    case: tuple[np.ndarray, layout.Perm], data: st.DataObject
) -> None:
    array, perm = case
    target = tuple(data.draw(st.permutations(range(array.ndim))))
    move = layout.movement(perm, target)
    moved = _stored(array, perm).transpose(move)
    np.testing.assert_array_equal(moved, array.transpose(target))
    if layout.keeps_order(_stored(array, perm).shape, move):
        np.testing.assert_array_equal(_stored(array, perm).reshape(moved.shape), moved)


@given(_layouts(), st.data())
def test_a_reshape_that_needs_no_data_movement(
    case: tuple[np.ndarray, layout.Perm], data: st.DataObject
) -> None:
    """Where a layout is given, the stored bytes reshaped are the torch tensor reshaped."""
    array, perm = case
    after = data.draw(st.composite(_splits)(array.size))
    found = layout.reshaped(array.shape, perm, after)
    if perm == layout.identity(array.ndim):
        assert found is not None
    if found is not None:
        stored = _stored(array, perm).reshape(layout.stored_shape(after, found))
        np.testing.assert_array_equal(_in_torch_order(stored, found), array.reshape(after))


@given(_layouts(), st.integers(0, 2))
def test_leading_axes_are_added_as_broadcasting_does(
    case: tuple[np.ndarray, layout.Perm], extra: int
) -> None:
    array, perm = case
    wide = (1,) * extra
    after = layout.widened(perm, array.ndim + extra)
    stored = _stored(array, perm).reshape(*wide, *_stored(array, perm).shape)
    np.testing.assert_array_equal(_in_torch_order(stored, after), array.reshape(*wide, *array.shape))
