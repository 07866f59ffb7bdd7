"""This machine as a device: streamed lines, limits, and nothing left running."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from tiny_artifacts import write_onnx, write_tflite

from edgecomp.devices import host
from edgecomp.devices.faults import ModelRefusedError, TookTooLongError, UnreachableError
from edgecomp.devices.host import Request
from edgecomp.devices.local import LocalDevice


def test_a_command_gives_code_streams_and_lines() -> None:
    lines: list[str] = []
    result = LocalDevice().run(["sh", "-c", "echo a; echo b; echo c >&2; exit 7"], 10, lines.append)
    assert (result.exit_code, result.stdout, result.stderr, lines) == (7, "a\nb\n", "c\n", ["a", "b"])


def test_a_signal_is_a_negative_code() -> None:
    assert LocalDevice().run(["sh", "-c", "kill -SEGV $$"], 10).exit_code == -11


def test_a_hung_command_and_its_children_are_killed(tmp_path: Path) -> None:
    script = f"sleep 300 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/self; wait"
    with pytest.raises(TookTooLongError, match="longer than 0.5 s"):
        LocalDevice("here").run(["sh", "-c", script], 0.5)
    for name in ("child", "self"):
        assert gone(int((tmp_path / name).read_text()))


def gone(pid: int) -> bool:
    """True when a process has ended (a zombie that waits for its parent has)."""
    for _ in range(50):
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return True
        if status.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_children_of_a_finished_command_do_not_stay(tmp_path: Path) -> None:
    LocalDevice().run(["sh", "-c", f"sleep 300 >/dev/null 2>&1 & echo $! > {tmp_path}/child"], 10)
    assert gone(int((tmp_path / "child").read_text()))


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(UnreachableError, match="no-such-program"):
        LocalDevice().run(["no-such-program"], 1)


def test_files_and_folders_are_copied(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_text("x")
    LocalDevice().push(tmp_path / "a", str(tmp_path / "b"))
    LocalDevice().pull(str(tmp_path / "b" / "f"), tmp_path / "c")
    assert (tmp_path / "c").read_text() == "x"


def test_the_machine_is_probed() -> None:
    found = LocalDevice().probe()
    assert found["isa"] == os.uname().machine
    assert found["python"] == ".".join(str(n) for n in sys.version_info[:3])
    assert found["cores"] and found["ram_bytes"] > 1 << 28 and not found["emulated"]


@pytest.mark.parametrize("name", ["cut.tflite", "cut.onnx"])
def test_a_damaged_file_is_bad_input_not_a_failed_device(name: str, tmp_path: Path) -> None:
    whole = tmp_path / name.replace("cut", "whole")
    (write_tflite if whole.suffix == ".tflite" else write_onnx)(whole)
    (tmp_path / name).write_bytes(whole.read_bytes()[:-120])
    with pytest.raises(ModelRefusedError, match="cannot run") as error:
        host.measure(LocalDevice("local"), Request(tmp_path / name, runs=1, seconds=0.1, warmup_seconds=0.0))
    assert error.value.exit_code == 2
