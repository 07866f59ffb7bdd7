"""One int8 file on emulated Arm cores and on x86, and a file that saturates on x86 without VNNI."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import lab_build as build
import lab_machine as machine
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from edgecomp import ladder
from edgecomp.calibration_data.sample import fashion_test
from edgecomp.cli import devices as devices_command
from edgecomp.cli import main
from edgecomp.devices import cross_isa
from edgecomp.devices.local import LocalDevice
from edgecomp.devices.qemu import QemuDevice, QemuX86Device
from edgecomp.devices.ssh import SshDevice

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import planted_faults


def write_qdq(path: Path, weights: np.ndarray) -> Path:
    """x [1, K] -> int8 -> MatMul with int8 weights [K, N] -> int8 -> float; scales 1/64, 1/127 and 2."""
    zero = np.int8(0)
    constants = {
        "xs": np.float32(1 / 64),
        "ws": np.float32(1 / 127),
        "ys": np.float32(2.0),
        "zero": zero,
        "w": weights,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "zero"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["m"]),
        helper.make_node("QuantizeLinear", ["m", "ys", "zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "ys", "zero"], ["y"]),
    ]
    doors = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, weights.shape[0]])]
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, weights.shape[1]])]
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "qdq", doors, results, held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    x = np.full((2, 64), 1.98, np.float32)
    x[1] = np.linspace(-1, 1, 64)
    np.savez(tmp_path / "in.npz", x=x)
    return tmp_path / "in.npz"


@pytest.mark.slow
def test_arm_cores_and_x86_give_the_same_integers(lab: None, tmp_path: Path, inputs: Path) -> None:
    weights = np.random.default_rng(0).integers(-30, 31, (64, 16)).astype(np.int8)
    arms = [QemuDevice(cpu, build.ROOT, cpu=cpu) for cpu in ("cortex-a53", "neoverse-n1", "max")]
    found = cross_isa.check([LocalDevice(), *arms], write_qdq(tmp_path / "m.onnx", weights), inputs)
    assert [row["soc"] for row in found["rows"][1:]] == ["cortex-a53", "neoverse-n1", "max"]
    for row in found["rows"]:
        assert row["largest_step"] <= 1 and row["top1_flips"] == 0 and not row["saturates"]


@pytest.mark.slow
def test_a_file_that_saturates_on_x86_is_flagged(lab: None, tmp_path: Path, inputs: Path) -> None:
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("no qemu-x86_64 here")
    weights = np.full((64, 16), 127, np.int8)
    weights[:, 1::2] = -127
    artifact = write_qdq(tmp_path / "m.onnx", weights)
    devices = [QemuDevice("arm", build.ROOT, cpu="cortex-a53"), QemuX86Device("old-x86")]
    arm, x86 = cross_isa.check(devices, artifact, inputs)["rows"]
    assert not arm["saturates"] and x86["saturates"]
    # By hand: 64 products of 127/64 and 1 sum to 127, stored as 64 (of 2.0). In vpmaddubsw the input is
    # 255 = 127 + 128; each pair saturates at 32767; 32 pairs less 128 * 64 * 127 leave 8160, stored as 1.
    result = cross_isa.run(devices[1], artifact, inputs)["y"][0]
    assert result[0] == 2.0 and cross_isa.run(devices[0], artifact, inputs)["y"][0][0] == 128.0


MODEL = """
import numpy as np
import torch


class Net(torch.nn.Module):
    \"\"\"Weights of 1 and -1 in turns, as the file holds them.\"\"\"

    def forward(self, x):
        signs = torch.ones(16)
        signs[1::2] = -1
        return (x.sum(dim=1, keepdim=True) * signs).clamp(-256, 254)


def net():
    return Net()


def loud():
    yield np.full((64,), 1.98, np.float32), 0
    yield np.linspace(-1, 1, 64, dtype=np.float32), 1
"""


@pytest.mark.slow
def test_parity_runs_the_file_on_every_processor_of_the_lab(lab: None, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    weights = np.full((64, 16), 127, np.int8)
    weights[:, 1::2] = -127
    artifact = write_qdq(tmp_path / "m.onnx", weights)
    book = ["--inventory", str(tmp_path / "devices.toml")]
    CliRunner().invoke(devices_command.command, ["add", "lab", "--qemu", str(build.ROOT), *book])
    words = ["parity", f"{tmp_path}/net.py:net", str(artifact), "--data", f"{tmp_path}/net.py:loud", *book]
    result = CliRunner().invoke(main, [*words, "--device", "lab", "--json", "-"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["artifacts"][0]["devices"]
    rows = {row["device"]: row for row in found["rows"]}
    arm = ["lab:cortex-a53", "lab:neoverse-n1", "lab:max"]
    assert list(rows)[:4] == ["local", *arm] and found["samples"] == 2
    for name in arm:
        assert not rows[name]["saturates"]
        if not rows["local"]["saturates"]:
            assert rows[name]["largest_step"] <= 1 and rows[name]["top1_flips"] == 0
    if shutil.which("qemu-x86_64"):
        assert rows["x86-without-vnni"]["saturates"] and found["saturates"] == 1
        assert any(line.startswith("saturates: on x86-without-vnni") for line in found["warnings"])


@pytest.mark.slow
def test_an_emulated_arm_core_and_a_board_over_ssh_are_rungs_of_the_ladder(
    lab: None, board: machine.Board, ssh: Callable[..., SshDevice], tmp_path: Path
) -> None:
    candidate = planted_faults.quantized()
    artifact = planted_faults.export(candidate, tmp_path)
    devices = [QemuDevice("neoverse", build.ROOT, cpu="neoverse-n1"), ssh()]
    report = ladder.climb(candidate, artifact, fashion_test(), limit=32, layer_samples=2, devices=devices)
    rungs = {r["name"]: r for r in report["rungs"]}
    assert list(rungs)[-2:] == ["neoverse", "lab"]
    for name in ("neoverse", "lab"):
        assert rungs[name]["passed"] and rungs[name]["samples"] == 32
        assert rungs[name]["sqnr_db"] == pytest.approx(rungs["deploy kernels"]["sqnr_db"], abs=1.0)


def test_the_command_names_who_was_compared(lab: None, tmp_path: Path, inputs: Path) -> None:
    artifact = write_qdq(tmp_path / "m.onnx", np.ones((64, 4), np.int8))
    words = ["agree", str(artifact), "--inputs", str(inputs), "--device", "local", "--device", "local"]
    result = CliRunner().invoke(
        devices_command.command, [*words, "--inventory", str(tmp_path / "d"), "--json", "-"]
    )
    assert json.loads(result.stdout)["reference"] == "local"
