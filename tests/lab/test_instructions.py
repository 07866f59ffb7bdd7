"""Instructions of one inference under QEMU: the same each time, more for more work, never a latency."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lab_build as build
import pytest
from click.testing import CliRunner

from edgecomp.cli import devices as devices_command
from edgecomp.cli import profile as profile_command
from edgecomp.devices import profiler
from edgecomp.devices.host import Request
from edgecomp.devices.qemu import QemuDevice
from edgecomp.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "devices"))
from tiny_artifacts import write_onnx, write_tflite


@pytest.fixture
def emulated(lab: None) -> QemuDevice:
    return QemuDevice("arm", build.ROOT, cpu="cortex-a53", plugin=build.PLUGIN)


@pytest.mark.slow
def test_two_counts_differ_by_less_than_a_thousandth(emulated: QemuDevice, tmp_path: Path) -> None:
    for artifact in (write_onnx(tmp_path / "m.onnx", width=512), write_tflite(tmp_path / "m.tflite")):
        first, second = (emulated.instructions(Request(artifact)) for _ in range(2))
        assert abs(first - second) < first / 1000


@pytest.mark.slow
def test_twice_the_layers_are_about_twice_the_instructions(emulated: QemuDevice, tmp_path: Path) -> None:
    counts = []
    for layers in (2, 4):
        artifact = write_onnx(tmp_path / f"m{layers}.onnx", width=512, layers=layers)
        counts.append(emulated.instructions(Request(artifact)))
    # A layer multiplies 512 x 512 numbers, four at a time in a vector of float32.
    assert 512 * 512 / 4 * 2 < counts[1] - counts[0] < 512 * 512 * 2
    assert 1.8 < counts[1] / counts[0] < 2.1


def test_the_command_counts_and_tells_no_time(lab: None, tmp_path: Path) -> None:
    book = ["--inventory", str(tmp_path / "d.toml")]
    settings = ["--set", f"plugin={build.PLUGIN}", "--set", "cpu=neoverse-n1"]
    add = CliRunner().invoke(
        devices_command.command, ["add", "arm", "--qemu", str(build.ROOT), *settings, *book]
    )
    assert add.exit_code == 0, add.output
    artifact = write_tflite(tmp_path / "m.tflite")
    words = [str(artifact), "--device", "arm", "--instructions", "--json", "-", *book]
    found = json.loads(CliRunner().invoke(profile_command.command, words).stdout)
    assert found["instructions"] > 1000 and found["latency_ms"] is None
    assert found["device"]["emulated"] and found["device"]["model"] == "qemu-aarch64 neoverse-n1"


def test_counting_needs_a_plugin(lab: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no counting plugin"):
        QemuDevice("arm", build.ROOT).instructions(Request(write_tflite(tmp_path / "m.tflite")))


def test_a_root_without_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no aarch64 system with Python"):
        QemuDevice("arm", tmp_path)


def test_times_of_an_emulated_machine_cannot_be_compared(emulated: QemuDevice, tmp_path: Path) -> None:
    artifact = write_onnx(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="is emulated"):
        profiler.compare(emulated, artifact, artifact)
