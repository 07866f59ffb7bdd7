"""The Jetson's way through its tools, with executables that replay their forms on the emulated board."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import lab_machine as machine
import pytest

from edgecomp.devices import faults, profiler
from edgecomp.devices.host import Request
from edgecomp.devices.jetson import JetsonDevice
from edgecomp.devices.ssh_connect import Login
from edgecomp.errors import DeviceError

sys.path.insert(0, str(Path(__file__).parents[1] / "devices"))
from tiny_artifacts import write_onnx, write_tflite

TRTEXEC = """#!/bin/sh
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec $*"
echo "$*" >> /root/calls
for word in "$@"; do case "$word" in
  --saveEngine=*) echo engine > "${word#*=}";;
  --loadEngine=*) [ -f "${word#*=}" ] || exit 1;;
  --exportTimes=*)
    echo '[{"startEnqMs": 0, "latencyMs": 9}, {"startEnqMs": 600, "latencyMs": 2},
           {"startEnqMs": 700, "latencyMs": 4}]' > "${word#*=}";;
  --exportProfile=*) echo '[{"count": 2}, {"name": "conv", "averageMs": 1.5}]' > "${word#*=}";;
  --exportLayerInfo=*) echo '{"Layers": ["conv"]}' > "${word#*=}";;
esac; done
[ -f /root/fail ] && { echo "[E] Error: unsupported node"; echo "&&&& FAILED TensorRT.trtexec"; exit 1; }
sleep 1
echo "[I] Latency: min = 2 ms, max = 4 ms, mean = 3 ms, median = 3 ms, percentile(99%) = 4 ms"
echo "&&&& PASSED TensorRT.trtexec [TensorRT v100300]"
"""
TEGRASTATS = """#!/bin/sh
echo "RAM 2512/7620MB CPU [12%@1190] GR3D_FREQ 45%@[306] cpu@42.5C VDD_IN 4000mW/4300mW"
echo "RAM 2512/7620MB CPU [12%@1190] GR3D_FREQ 45%@[306] cpu@42.5C VDD_IN 6000mW/4300mW"
sleep 1
"""


@pytest.fixture
def jetson(board: machine.Board, tmp_path: Path) -> Iterator[JetsonDevice]:
    login = Login(
        "127.0.0.1",
        "root",
        board.port,
        key=str(board.key),
        config=str(tmp_path / "none"),
        known_hosts=str(board.known_hosts),
    )
    device = JetsonDevice("orin", login)
    for name, text in (("trtexec", TRTEXEC), ("tegrastats", TEGRASTATS)):
        (tmp_path / name).write_text(text)
        device.push(tmp_path / name, f"/root/bin/{name}")
    device.run(
        ["sh", "-c", "chmod 755 /root/bin/*; rm -rf /root/calls /root/fail /root/.edgecomp/engines"], 20
    )
    device.tools = "/root/bin"
    yield device
    device.close()


def test_an_engine_is_built_once_and_timed(jetson: JetsonDevice, tmp_path: Path) -> None:
    request = Request(write_onnx(tmp_path / "m.onnx"), warmup_seconds=0.5)
    found = jetson.measure(request)[0]
    assert found.runtime == {"name": "trtexec", "version": "10.3.0", "accelerator": "tensorrt"}
    assert found.samples_ms == (2.0, 4.0)
    assert found.ops == [{"name": "conv", "type": "", "ms": 1.5, "placed_on": "tensorrt"}]
    assert found.energy_mj == pytest.approx(5000 * 3 / 1000), "5 W for 3 ms"
    jetson.measure(request)
    calls = jetson.run(["cat", "/root/calls"], 20).stdout
    assert calls.count("--saveEngine") == 1 and calls.count("--loadEngine") == 2
    assert "--int8" in calls and "--skipInference" in calls


INA = "/sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"


def test_energy_comes_from_the_ina3221_where_tegrastats_is_silent(
    jetson: JetsonDevice, tmp_path: Path
) -> None:
    readings = {"in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "800"}
    writing = [f"echo {value} > {INA}/{name}" for name, value in readings.items()]
    jetson.run(["sh", "-c", "; ".join(["rm /root/bin/tegrastats", f"mkdir -p {INA}", *writing])], 20)
    try:
        request = Request(write_tflite(tmp_path / "m.tflite"), seconds=3.0)
        found = jetson.measure(request)[0]
    finally:
        jetson.run(["rm", "-rf", "/sys/bus/i2c"], 20)
    mean_ms = sum(found.samples_ms) / len(found.samples_ms)
    assert found.runtime["name"] == "ai_edge_litert"
    assert found.energy_mj == pytest.approx(4.0 * mean_ms), "5 V and 0.8 A are 4 W"


CLOCKS = """#!/bin/sh
echo "$*" | sed 's/ .*//' >> /root/clock-calls
[ -f /root/fail-clocks ] && { echo "cannot open store" >&2; exit 1; }
exit 0
"""


def test_clocks_are_locked_for_a_run_and_given_back(jetson: JetsonDevice, tmp_path: Path) -> None:
    (tmp_path / "jetson_clocks").write_text(CLOCKS)
    jetson.push(tmp_path / "jetson_clocks", "/root/bin/jetson_clocks")
    jetson.run(["sh", "-c", "chmod 755 /root/bin/*; rm -f /root/clock-calls /root/fail-clocks"], 20)
    request = Request(write_onnx(tmp_path / "m.onnx"), warmup_seconds=0.5)
    jetson.clocks = True
    assert jetson.measure(request)[0].notes == ("clocks locked by jetson_clocks",)
    assert jetson.run(["cat", "/root/clock-calls"], 20).stdout == "--store\n\n--restore\n"
    jetson.run(["touch", "/root/fail-clocks"], 20)
    with pytest.raises(DeviceError, match=r"could not be locked.*cannot open store"):
        jetson.measure(request)


def test_a_file_that_tensorrt_refuses_leaves_no_engine(jetson: JetsonDevice, tmp_path: Path) -> None:
    jetson.run(["touch", "/root/fail"], 20)
    with pytest.raises(faults.ModelRefusedError, match="unsupported node"):
        jetson.measure(Request(write_onnx(tmp_path / "m.onnx")))
    assert jetson.run(["ls", ".edgecomp/engines"], 20).stdout == ""


def test_without_trtexec_onnx_runtime_is_the_second_choice(jetson: JetsonDevice, tmp_path: Path) -> None:
    jetson.tools = "/nowhere"
    p = profiler.profile(jetson, write_onnx(tmp_path / "m.onnx"))
    assert p["runtime"]["name"] == "onnxruntime" and p["latency_ms"] is None
    with pytest.raises(faults.RuntimeMissingError, match="has no trtexec"):
        jetson.measure(Request(write_onnx(tmp_path / "m.onnx"), accelerator="trtexec"))
