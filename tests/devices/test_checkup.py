"""What a device lacks, and which wheels fit it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgecomp.devices import checkup
from edgecomp.devices.fake import UNKNOWN, FakeDevice
from edgecomp.devices.faults import RuntimeMissingError
from edgecomp.errors import InputError

WELL = UNKNOWN | {
    "python": "3.11.2",
    "runtimes": {"numpy": "2.0", "onnxruntime": "1.20", "tflite-runtime": "2.14.0"},
    "tools": ["timeout", "setsid"],
    "governor": "performance",
    "isa": "aarch64",
}


def test_a_machine_that_has_all_lacks_nothing() -> None:
    assert checkup.lacking("pi", WELL) == []


def test_each_gap_comes_with_the_way_to_fill_it() -> None:
    gaps = checkup.lacking("pi", WELL | {"runtimes": {}, "tools": [], "governor": "ondemand"})
    assert [gap["what"].split()[0] for gap in gaps] == ["a", "a", "NumPy", "timeout,", "setsid,", "a"]
    assert gaps[0]["get"] == "edgecomp devices setup pi"
    assert "cpupower" in gaps[-1]["get"]
    assert checkup.lacking("pi", WELL | {"python": "3.7.3"})[0]["what"].endswith("3.7.3 is there")
    assert "apt-get install python3" in checkup.lacking("pi", WELL | {"python": None})[0]["get"]


def test_this_machine_is_mended_with_extras() -> None:
    assert checkup.lacking("local", WELL | {"runtimes": {"numpy": "2"}})[0]["get"] == (
        "pip install 'edgecomp[tflite]'"
    )


def test_wheels_may_not_need_a_newer_c_library() -> None:
    assert checkup.platforms("aarch64", "2.28") == [
        "manylinux2014_aarch64",
        "manylinux_2_17_aarch64",
        "manylinux_2_24_aarch64",
        "manylinux_2_26_aarch64",
        "manylinux_2_27_aarch64",
        "manylinux_2_28_aarch64",
    ]
    assert checkup.platforms("aarch64", None) == checkup.platforms("aarch64", "2.28")


def test_setup_is_for_devices_that_have_a_folder_for_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes no runtime"):
        checkup.setup(FakeDevice())
    with pytest.raises(InputError, match="no runtime for 'caffe'"):
        checkup.setup(FakeDevice(), kinds=("caffe",))


def test_setup_needs_python_there_and_wheels_here(tmp_path: Path) -> None:
    class Board(FakeDevice):
        runtime_folder = "runtime"

    with pytest.raises(RuntimeMissingError, match="has no Python"):
        checkup.setup(Board(), wheels=tmp_path)
    with pytest.raises(InputError, match="no .whl file"):
        checkup.setup(Board(facts={"python": "3.11.2"}), wheels=tmp_path)
