"""From the inventory to a profile on the emulated Arm machine, and runtimes that fail there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lab_build as build
import lab_machine as machine
import pytest
from click.testing import CliRunner

from edgecomp.cli import devices as devices_command
from edgecomp.cli import profile as profile_command
from edgecomp.devices import checkup, faults, profiler
from edgecomp.devices.host import Settings
from edgecomp.devices.ssh import SshDevice

sys.path.insert(0, str(Path(__file__).parents[1] / "devices"))
from tiny_artifacts import write_onnx, write_tflite

Make = Callable[..., SshDevice]
BARE = "python3 -S"  # does not see the runtimes that the root has


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    found = {"onnx": write_onnx(folder / "chain.onnx"), "tflite": write_tflite(folder / "chain.tflite")}
    return found


def test_both_formats_run_and_no_emulated_time_is_told(ssh: Make, artifacts: dict[str, Path]) -> None:
    device = ssh()
    for kind, runtime in (("onnx", "onnxruntime"), ("tflite", "ai_edge_litert")):
        p = profiler.profile(device, artifacts[kind])
        assert p["runtime"]["name"] == runtime
        assert p["device"]["emulated"] and p["device"]["isa"] == "aarch64"
        for key in ("init_ms", "first_ms", "latency_ms", "peak_rss_bytes", "energy_mj"):
            assert p[key] is None
        assert p["warnings"] == ["emulated: this machine is emulated, so times and memory were not reported"]


@pytest.mark.slow
def test_a_runtime_that_is_missing_is_installed_by_setup(
    ssh: Make, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    device = ssh(workdir="fresh", interpreter=BARE)
    with pytest.raises(faults.RuntimeMissingError, match="edgecomp devices setup lab"):
        profiler.profile(device, artifacts["onnx"])
    gaps = [gap["what"] for gap in checkup.lacking("lab", device.probe())]
    assert "a runtime for onnx files" in gaps
    for wheel in build.WHEELS.glob("*.whl"):
        if not wheel.name.startswith("ai_edge_litert"):
            (tmp_path / wheel.name).symlink_to(wheel)
    versions = checkup.setup(device, kinds=("onnx",), wheels=tmp_path)
    assert versions.keys() >= {"numpy", "onnxruntime"}
    assert profiler.profile(device, artifacts["onnx"])["runtime"]["name"] == "onnxruntime"


def test_a_wheel_that_does_not_fit_is_told(ssh: Make, tmp_path: Path) -> None:
    wheel = tmp_path / "onnxruntime-0.0.1-py3-none-any.whl"
    package = tmp_path / "w" / "onnxruntime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs GLIBC_2.99')\n")
    facts = tmp_path / "w" / "onnxruntime-0.0.1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime\nVersion: 0.0.1\n")
    shutil.make_archive(str(wheel), "zip", tmp_path / "w")
    Path(f"{wheel}.zip").rename(wheel)
    device = ssh(workdir="old", interpreter=BARE)
    with pytest.raises(faults.RuntimeMissingError, match=r"does not load on device 'lab'.*GLIBC_2.99"):
        checkup.setup(device, kinds=("onnx",), wheels=tmp_path)


def test_a_model_that_crashes_the_runtime_reports_the_signal(
    ssh: Make, artifacts: dict[str, Path], tmp_path: Path, board: machine.Board
) -> None:
    device = ssh()
    crashing = 'import os; print(\'{"event": "start"}\', flush=True); os.abort()'
    device.python = lambda: ("python3", "-c", crashing)  # type: ignore[method-assign]
    with pytest.raises(faults.ModelCrashError, match="SIGABRT") as caught:
        profiler.profile(device, artifacts["onnx"])
    assert caught.value.signal == 6


def test_a_hung_runner_is_ended(ssh: Make, artifacts: dict[str, Path], board: machine.Board) -> None:
    device = ssh()
    hanging = 'case "$1" in *agent.py) exec sleep 300;; esac; exec python3 "$@"'
    device.python = lambda: ("sh", "-c", hanging, "sh")  # type: ignore[method-assign]
    with pytest.raises(faults.TookTooLongError):
        profiler.profile(device, artifacts["onnx"], Settings(timeout_s=2))
    assert board.processes() == []


def test_the_commands_work_from_the_inventory(
    board: machine.Board, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    book = ["--inventory", str(tmp_path / "devices.toml")]

    def run(command: Any, *words: str) -> Any:
        return CliRunner().invoke(command, [*words, *book])

    where = ["--ssh", f"root@127.0.0.1:{board.port}", "--key", str(board.key)]
    refused = run(devices_command.command, "add", "lab", *where, "--accept-host-key", "SHA256:wrong")
    assert isinstance(refused.exception, faults.HostKeyError)
    shown = str(refused.exception).split("SHA256:")[1].split(";")[0]
    added = run(devices_command.command, "add", "lab", *where, "--accept-host-key", f"SHA256:{shown}")
    assert added.exit_code == 0, added.output

    row = json.loads(run(devices_command.command, "check", "lab", "--json", "-").stdout)["devices"][0]
    assert row["error"] is None and row["facts"]["soc"] == "Cortex-A72"
    assert any("governor is ondemand" in gap["what"] for gap in row["lacking"])

    result = run(
        profile_command.command,
        str(artifacts["tflite"]),
        "--device",
        "lab",
        "--device",
        "local",
        "--json",
        "-",
    )
    found = json.loads(result.stdout)
    assert {p["device"]["name"] for p in found["profiles"]} == {"lab", "local"} and not found["failures"]
    by_name = {p["device"]["name"]: p for p in found["profiles"]}
    assert by_name["lab"]["latency_ms"] is None and by_name["local"]["latency_ms"]["p50"] > 0


def test_a_device_that_is_lost_does_not_end_the_others(
    board: machine.Board, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    book = ["--inventory", str(tmp_path / "devices.toml")]
    gone = ["--ssh", f"root@127.0.0.1:{machine.free_port()}"]
    CliRunner().invoke(devices_command.command, ["add", "gone", *gone, *book])
    words = [str(artifacts["onnx"]), "--device", "gone", "--device", "local", "--json", "-", *book]
    result = CliRunner().invoke(profile_command.command, words)
    found = json.loads(result.stdout)
    assert [p["device"]["name"] for p in found["profiles"]] == ["local"]
    assert [f["kind"] for f in found["failures"]] == ["UnreachableError"]
    assert getattr(result.exception, "exit_code", None) == 4


def test_ctrl_c_on_the_host_leaves_nothing_running_and_says_130(
    board: machine.Board, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    book = ["--inventory", str(tmp_path / "devices.toml")]
    shutil.copyfile(board.known_hosts, tmp_path / "known_hosts")
    hanging = 'sh -c \'case "$1" in *agent.py) exec sleep 400;; esac; exec python3 "$@"\' sh'
    where = ["--ssh", f"root@127.0.0.1:{board.port}", "--key", str(board.key), "--python", hanging]
    CliRunner().invoke(devices_command.command, ["add", "lab", *where, *book])
    argv = [sys.executable, "-m", "edgecomp", "profile", str(artifacts["onnx"]), "--device", "lab", *book]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    machine.wait_for(lambda: any("sleep 400" in line for line in board.processes()), 60, "the run")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in stderr
    machine.wait_for(lambda: board.processes() == [], 15, "the end of the run on the device")
