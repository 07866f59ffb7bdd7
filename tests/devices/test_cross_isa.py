"""Agreement of outputs by hand, and the whole check on this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgecomp.devices import cross_isa
from edgecomp.devices.local import LocalDevice
from edgecomp.errors import DataError, InputError


def test_a_step_is_one_for_integers_and_the_smallest_gap_for_floats() -> None:
    assert cross_isa.step_of([np.array([3, 90], np.int8)]) == 1.0
    assert cross_isa.step_of([np.array([0.0, 2.0], np.float32), np.array([0.5, 0.5], np.float32)]) == 0.5
    assert cross_isa.step_of([np.array([7.0])]) == 1.0


def test_agreement_by_hand() -> None:
    a = {"y": np.array([[1, 5, 2], [9, 0, 0]], np.int8)}
    b = {"y": np.array([[1, 5, 3], [0, 9, 0]], np.int8)}
    # 6 values, 3 equal; differences 0 0 1 / 9 9 0; the second sample's top-1 moved from 0 to 1
    assert cross_isa.agreement(a, b) == {"equal_share": 3 / 6, "largest_step": 9, "top1_flips": 1}
    floats = {"y": a["y"] * np.float32(0.25)}
    assert cross_isa.agreement(floats, {"y": b["y"] * np.float32(0.25)})["largest_step"] == 9


def test_extremes_of_int8_do_not_wrap() -> None:
    a, b = {"y": np.array([[-128, 0]], np.int8)}, {"y": np.array([[127, 0]], np.int8)}
    assert cross_isa.agreement(a, b)["largest_step"] == 255


def test_outputs_of_different_artifacts_are_refused() -> None:
    with pytest.raises(DataError, match="same artifact"):
        cross_isa.agreement({"y": np.zeros((1, 2))}, {"y": np.zeros((1, 3))})


def test_a_device_agrees_with_itself(tiny_onnx: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32))
    found = cross_isa.check([LocalDevice("a"), LocalDevice("b")], tiny_onnx, tmp_path / "in.npz")
    assert found["samples"] == 3 and found["reference"] == "a" and found["warnings"] == []
    for row in found["rows"]:
        assert (row["equal_share"], row["largest_step"], row["top1_flips"]) == (1.0, 0, 0)


def test_devices_must_be_named(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no device"):
        cross_isa.check([], tiny_onnx, tmp_path)


def test_kernels_that_are_far_off_are_named_by_their_cause() -> None:
    row = {"device": "d", "isa": "x86_64", "reference_step": 30, "saturates": True}
    assert cross_isa._warning(row).startswith("saturates: on d (x86_64)")
    assert cross_isa._warning(row | {"saturates": False}).startswith("wrong kernels: on d")


@pytest.mark.parametrize(
    "steps, others, expected",
    [(21, 21, True), (20, 20, False), (20, 2, True), (20, 6, False), (10, 0, False), (11, 0, True)],
)
def test_far_off_is_more_than_rounding_or_than_others_need(steps: int, others: int, expected: bool) -> None:
    rows = [{"device": "old", "reference_step": steps, "x86": True}, {"reference_step": others, "x86": False}]
    old, other = cross_isa.judged(rows)
    assert old["saturates"] is expected and not other["saturates"] and "x86" not in old
