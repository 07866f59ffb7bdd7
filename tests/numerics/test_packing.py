"""Bit packing against bytes written out by hand, and round trips."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecomp.numerics import packing


@pytest.mark.parametrize(
    ("values", "bits", "expected"),
    [
        ([1, 0, 0, 0, 0, 0, 0, 1, 1], 1, "81 01"),
        ([1, 2, 3, 0], 2, "39"),  # 0b00_11_10_01
        ([1, 2, 3], 3, "d1 00"),  # 0b11_010_001, then the high bit of 3 (0)
        ([7, 7, 7], 3, "ff 01"),
        ([1, 2, 3], 4, "21 03"),
        ([-8, 7], 4, "78"),
        ([1, 63], 6, "c1 0f"),  # 0b11_000001, 0b0000_1111
        ([200, 3], 8, "c8 03"),
    ],
)
def test_pack_by_hand(values: list[int], bits: int, expected: str) -> None:
    assert packing.pack(np.array(values), bits) == bytes.fromhex(expected)


@given(st.sampled_from(packing.WIDTHS), st.booleans(), st.data())
def test_unpack_is_the_inverse(bits: int, signed: bool, data: st.DataObject) -> None:
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    values = data.draw(st.lists(st.integers(low, high), max_size=70))
    packed = packing.pack(np.array(values, np.int64), bits)
    assert len(packed) == packing.packed_bytes(len(values), bits) == -(-len(values) * bits // 8)
    assert packing.unpack(packed, bits, len(values), signed=signed).tolist() == values


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"span \[0, 16\]; 4 bits hold \[0, 15\]"):
        packing.pack(np.array([0, 16]), 4)
    with pytest.raises(ValueError, match="bits is 5"):
        packing.pack(np.array([0]), 5)
    with pytest.raises(ValueError, match="9 values of 4 bits need 5 bytes; got 4"):
        packing.unpack(b"\0" * 4, 4, 9)
