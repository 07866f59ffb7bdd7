"""trtexec, tegrastats and INA3221: the forms that their versions print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgecomp.devices import jetson_power, tegra, trtexec
from edgecomp.devices.faults import OutputFormError
from edgecomp.devices.host import Request
from edgecomp.errors import DeviceError

TENSORRT_10 = """&&&& RUNNING TensorRT.trtexec [TensorRT v100300] [b26] # trtexec --loadEngine=m.engine
[11/24/2026-10:00:00] [I] === Performance summary ===
[11/24/2026-10:00:00] [I] Throughput: 812.1 qps
[11/24/2026-10:00:00] [I] Latency: min = 1.1 ms, max = 2.5 ms, mean = 1.25 ms, median = 1.2 ms, \
percentile(90%) = 1.4 ms, percentile(95%) = 1.5 ms, percentile(99%) = 2.1 ms
[11/24/2026-10:00:00] [I] GPU Compute Time: min = 1.0 ms, max = 2.4 ms, mean = 1.15 ms, median = 1.1 ms
&&&& PASSED TensorRT.trtexec [TensorRT v100300] # trtexec
"""
TENSORRT_8 = """&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec
[I] Latency: min = 1.1 ms, max = 2.5 ms, mean = 1.25 ms, median = 1.2 ms, percentile(99%) = 2.1 ms
&&&& PASSED TensorRT.trtexec [TensorRT v8502] # trtexec
"""
TENSORRT_7 = """&&&& RUNNING TensorRT.trtexec # trtexec
[I] TensorRT version: 7.1.3
[I] min: 1.1 ms (end to end 1.3 ms)
[I] max: 2.5 ms (end to end 2.9 ms)
[I] mean: 1.25 ms (end to end 1.5 ms)
[I] median: 1.2 ms (end to end 1.4 ms)
[I] percentile: 2.1 ms at 99% (end to end 2.2 ms at 99%)
&&&& PASSED TensorRT.trtexec # trtexec
"""


@pytest.mark.parametrize(
    ("text", "version", "more"),
    [
        (TENSORRT_10, "10.3.0", {"p90": 1.4, "p95": 1.5}),
        (TENSORRT_8, "8.5.2", {}),
        (TENSORRT_7, "7.1.3", {}),
    ],
)
def test_latency_in_three_generations(text: str, version: str, more: dict[str, float]) -> None:
    expected = {"min": 1.1, "max": 2.5, "mean": 1.25, "p50": 1.2, "p99": 2.1}
    assert trtexec.latency(text) == expected | more
    assert trtexec.version(text) == version and trtexec.passed(text)


def test_a_failed_run_is_not_a_passed_one() -> None:
    assert not trtexec.passed("&&&& FAILED TensorRT.trtexec [TensorRT v8502]")
    with pytest.raises(OutputFormError):
        trtexec.latency("&&&& FAILED TensorRT.trtexec")


def test_times_leave_the_warm_up_out() -> None:
    rows = [{"startEnqMs": t, "computeMs": 1.0, "latencyMs": 2.0 + t / 1000} for t in (0, 400, 500, 900)]
    assert trtexec.samples(json.dumps(rows), 500) == (2.5, 2.9)
    assert trtexec.samples(json.dumps(rows[:1]), 500) == (2.0,)


@pytest.mark.parametrize("text", ["", "{}", "[]", '[{"x": 1}]', "[1]"])
def test_times_of_another_form_are_kept(text: str) -> None:
    with pytest.raises(OutputFormError) as caught:
        trtexec.samples(text, 0)
    assert caught.value.text == text


def test_layers_with_and_without_detail() -> None:
    profile = [
        {"count": 100},
        {"name": "conv1", "timeMs": 50.0, "averageMs": 0.5, "medianMs": 0.4, "percentage": 60.0},
        {"name": "fc", "timeMs": 10.0, "averageMs": 0.1, "percentage": 40.0},
    ]
    detail = {
        "Layers": [
            {"Name": "conv1", "LayerType": "CaskConvolution", "Outputs": [{"Format/Datatype": "Int8 NHWC"}]},
            "fc",
        ]
    }
    rows = trtexec.layers(json.dumps(profile), json.dumps(detail))
    assert rows == [
        {"name": "conv1", "type": "CaskConvolution Int8 NHWC", "ms": 0.4, "placed_on": "tensorrt"},
        {"name": "fc", "type": "", "ms": 0.1, "placed_on": "tensorrt"},
    ]
    assert [row["type"] for row in trtexec.layers(json.dumps(profile))] == ["", ""]


def test_arguments_by_age(tmp_path: Path) -> None:
    assert "--skipInference" in trtexec.building("m.onnx", "e", old=False)
    assert "--buildOnly" in trtexec.building("m.onnx", "e", old=True)
    words = trtexec.timing("e", "out", Request(tmp_path, runs=70, seconds=3, warmup_seconds=0.5))
    assert {"--warmUp=500", "--duration=3", "--iterations=70", "--exportTimes=out/times.json"} <= set(words)


ORIN = (
    "11-24-2026 10:00:00 RAM 2512/7620MB (lfb 4x2MB) SWAP 100/3810MB (cached 0MB) "
    "CPU [12%@1190,off,3%@1510,0%@1190] EMC_FREQ 2%@2133 GR3D_FREQ 45%@[306] NVENC off VIC_FREQ 115 "
    "cpu@42.5C soc2@41.1C tboard@-256C gpu@43C VDD_IN 4500mW/4300mW VDD_CPU_GPU_CV 900mW/850mW "
    "VDD_SOC 1100mW/1000mW"
)
XAVIER = (
    "RAM 3000/31919MB (lfb 6000x4MB) CPU [1%@1190,2%@1190] EMC_FREQ 0%@1600 GR3D_FREQ 0%@318 "
    "GPU@35C/36C PLL@-256C GPU 153/153 SOC 900/900 VDDRQ 300/300 SYS5V 1600/1600"
)
NANO = (
    "RAM 1000/3964MB (lfb 1x4MB) IRAM 0/252kB(lfb 252kB) CPU [5%@102] GR3D_FREQ 0%@76 PLL@30C "
    "POM_5V_IN 1800/1700"
)
THOR = "RAM 5000/122000MB CPU [0%@972] GR3D_FREQ @[1575,1575,1575] cpu@40.1C VIN_SYS_5V0 9000mW/8800mW"


def test_an_orin() -> None:
    sample = tegra.parse_line(ORIN)
    assert sample == tegra.Sample(
        ram_mb=(2512, 7620),
        swap_mb=(100, 3810),
        cpu_percent=(12, None, 3, 0),
        cpu_mhz=(1190, None, 1510, 1190),
        gpu_percent=45,
        gpu_mhz=(306,),
        memory_mhz=2133,
        celsius={"cpu": 42.5, "soc2": 41.1, "gpu": 43.0},
        milliwatts={"VDD_IN": 4500, "VDD_CPU_GPU_CV": 900, "VDD_SOC": 1100},
    )


def test_older_and_newer_boards() -> None:
    xavier, nano, thor = (tegra.parse_line(line) for line in (XAVIER, NANO, THOR))
    assert xavier and nano and thor
    assert xavier.gpu_mhz == (318,) and xavier.celsius == {"GPU": 35.0}
    assert xavier.milliwatts == {"GPU": 153, "SOC": 900, "VDDRQ": 300, "SYS5V": 1600}
    assert nano.milliwatts == {"POM_5V_IN": 1800} and nano.swap_mb is None
    assert thor.gpu_percent is None and thor.gpu_mhz == (1575, 1575, 1575)
    assert thor.milliwatts == {"VIN_SYS_5V0": 9000}


@pytest.mark.parametrize("line", ["", "tegrastats: command not found", "hello world"])
def test_lines_that_are_no_sample(line: str) -> None:
    assert tegra.parse_line(line) is None


def test_board_power_is_that_of_the_rail_that_feeds_it() -> None:
    assert tegra.total_milliwatts({"VDD_SOC": 1.0, "VDD_IN": 4000.0}) == 4000
    assert tegra.total_milliwatts({"GPU": 3.0}) is None and tegra.total_milliwatts({}) is None


def test_mean_power_is_of_the_readings_between_two_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["RAM 1/2MB VDD_IN 4000mW/1mW", "RAM 1/2MB GPU 7mW/1mW", "noise", "RAM 1/2MB VDD_IN 6000mW/1mW"]

    class Board:
        def run(self, argv: list[str], timeout_s: float, on_line: Callable[[str], None]) -> None:
            for at, line in enumerate(lines):
                monkeypatch.setattr(jetson_power.time, "monotonic", lambda at=at: float(at))
                on_line(line)
            raise DeviceError("gone")

    watch = jetson_power.PowerWatch(Board(), "/usr/bin")
    watch.stop()
    assert watch.readings == [(0.0, 4000.0), (3.0, 6000.0)]
    assert watch.mean() == 5000 and watch.mean(1.0, 4.0) == 6000 and watch.mean(7.0, 9.0) is None


def test_ina3221_and_power_mode() -> None:
    assert tegra.ina3221("VDD_IN 5040 700\nbroken\nVDD_CPU_GPU_CV 5032 120\n") == {
        "VDD_IN": 3528.0,
        "VDD_CPU_GPU_CV": 603.84,
    }
    assert tegra.power_mode("NV Power Mode: MAXN\n0\n") == "MAXN"
    assert tegra.power_mode("") is None
