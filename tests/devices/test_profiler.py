"""The profile object: every key, nothing made up, each failure by its own name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecomp import files, manifest
from edgecomp.devices import faults, profiler
from edgecomp.devices.fake import FakeDevice
from edgecomp.devices.host import Settings
from edgecomp.devices.local import LocalDevice
from edgecomp.errors import ArtifactError, DataError, DeviceError, InputError, MissingError, UnknownNameError
from edgecomp.spec import Artifact, TensorSpec

KEYS = {
    "device",
    "artifact",
    "runtime",
    "init_ms",
    "first_ms",
    "latency_ms",
    "throughput_per_s",
    "peak_rss_bytes",
    "load_rss_bytes",
    "model_bytes",
    "ops",
    "thermal",
    "energy_mj",
    "instructions",
    "warnings",
}
COOL = {"governors": {"cpu0": "performance"}, "temperatures": [["cpu", 40.0]], "vcgencmd": "throttled=0x0"}
WARM = COOL | {"temperatures": [["cpu", 61.5]]}


def events(samples: list[float], **after: Any) -> list[dict[str, Any]]:
    return [
        {"event": "start", "state": COOL},
        {"event": "runtime", "model": 0, "name": "r", "version": "1"},
        {
            "event": "init",
            "model": 0,
            "ms": 9.0,
            "accelerator": "cpu",
            "before": {"rss": 1},
            "after": {"rss": 2},
        },
        {"event": "first", "model": 0, "ms": 5.0},
        {"event": "warmup", "model": 0, "ms": [3.0, 2.0], "stable": True},
        {"event": "samples", "model": 0, "ms": samples},
        {"event": "after", "state": WARM, "joules": 0.5, "runs": 5, "other_cores": 0.0, **after},
        {"event": "memory", "rss": 3, "peak": 4, "pss": 2, "swapped": 0},
        {"event": "ops", "ops": [{"name": "n", "type": "Conv", "ms": 1.0, "placed_on": "cpu"}]},
        {"event": "done"},
    ]


def test_all_keys_of_the_contract_from_real_runs(tiny_onnx: Path, tiny_tflite: Path) -> None:
    for artifact in (tiny_onnx, tiny_tflite):
        p = profiler.profile(LocalDevice(), artifact, Settings(seconds=0.05))
        assert p.keys() >= KEYS
        assert p["device"].keys() >= {"name", "kind", "model", "isa", "os", "governor", "emulated"}
        assert p["runtime"].keys() == {"name", "version", "accelerator"}
        assert p["thermal"].keys() == {"throttled", "start_c", "end_c"}
        spread = p["latency_ms"]
        assert spread.keys() == {"samples", "min", "mean", "p50", "p90", "p95", "p99", "max", "ci95"}
        assert len(spread["samples"]) >= 50
        assert (
            spread["min"] <= spread["p50"] <= spread["p90"] <= spread["p95"] <= spread["p99"] <= spread["max"]
        )
        assert p["model_bytes"] == artifact.stat().st_size
        assert p["load_rss_bytes"] <= p["peak_rss_bytes"]


def test_figures_are_taken_over_as_the_agent_told_them(tiny_onnx: Path) -> None:
    p = profiler.profile(FakeDevice(events=events([1.0, 3.0, 2.0, 4.0])), tiny_onnx)
    assert (p["init_ms"], p["first_ms"], p["load_rss_bytes"], p["peak_rss_bytes"]) == (9.0, 5.0, 2, 4)
    assert p["latency_ms"]["p50"] == 2.5 and p["latency_ms"]["samples"] == [1.0, 3.0, 2.0, 4.0]
    assert p["throughput_per_s"] == 400.0
    assert p["energy_mj"] == 100.0
    assert p["thermal"] == {"throttled": False, "start_c": 40.0, "end_c": 61.5}
    assert p["device"]["governor"] == "performance"


def test_an_emulated_time_is_never_a_latency(tiny_onnx: Path) -> None:
    device = FakeDevice(events=events([1.0, 3.0]), facts={"emulated": True})
    p = profiler.profile(device, tiny_onnx)
    timed = ("init_ms", "first_ms", "latency_ms", "throughput_per_s", "peak_rss_bytes", "energy_mj", "noise")
    assert all(p[key] is None for key in timed)
    assert p["device"]["emulated"] and p["warnings"][0].startswith("emulated")
    assert "--runs 1" in " ".join(device.commands[0])


def test_core_ml_has_no_latency_off_a_mac(tmp_path: Path) -> None:
    package = tmp_path / "m.mlpackage"
    package.mkdir()
    (package / "Manifest.json").write_text("{}")
    p = profiler.profile(LocalDevice(), package)
    assert p["latency_ms"] is None and p["runtime"]["name"] is None and p["model_bytes"] == 2
    assert "no device's latency" in p["warnings"][0]


def test_bad_artifacts_are_found_before_the_work(tmp_path: Path) -> None:
    device = FakeDevice()
    with pytest.raises(ArtifactError, match="no artifact at"):
        profiler.profile(device, tmp_path / "m.onnx")
    with pytest.raises(ArtifactError, match="does not end in"):
        profiler.profile(device, tmp_path / "m.pt")
    assert device.commands == []


def test_settings_are_checked(tiny_onnx: Path) -> None:
    with pytest.raises(InputError, match="threads is 0"):
        profiler.profile(FakeDevice(), tiny_onnx, Settings(threads=0))
    with pytest.raises(InputError, match="cannot count instructions"):
        profiler.profile(FakeDevice(events=events([1.0])), tiny_onnx, instructions=True)


def failing(kind: str) -> list[dict[str, Any]]:
    return [{"event": "start", "state": {}}, {"event": "error", "kind": kind, "message": "the reason"}]


@pytest.mark.parametrize(
    ("device", "error", "words"),
    [
        (FakeDevice(events=failing("runtime-missing")), faults.RuntimeMissingError, "devices setup fake"),
        (FakeDevice(events=failing("model")), faults.ModelRefusedError, "the reason"),
        (FakeDevice(events=failing("inputs")), DataError, "the reason"),
        (FakeDevice(events=failing("usage")), InputError, "the reason"),
        (FakeDevice(kind="local", events=failing("runtime-missing")), MissingError, r"edgecomp\[onnx\]"),
        (FakeDevice(events=events([1.0])[:3], exit_code=-11), faults.ModelCrashError, "SIGSEGV"),
        (FakeDevice(events=events([1.0])[:3], exit_code=-9), faults.ModelCrashError, "out of memory"),
        (FakeDevice(events=events([1.0])[:3]), faults.DroppedError, "went silent"),
        (FakeDevice(exit_code=127, stderr="sh: python3: not found"), faults.RuntimeMissingError, "not found"),
        (FakeDevice(exit_code=1, stderr="boom"), DeviceError, "exit code 1.*boom"),
        (FakeDevice(text="hello\n"), faults.OutputFormError, "hello"),
    ],
)
def test_each_failure_has_its_name(
    device: FakeDevice, error: type[Exception], words: str, tiny_onnx: Path
) -> None:
    with pytest.raises(error, match=words):
        profiler.profile(device, tiny_onnx)


def test_unreadable_output_is_kept_whole(tiny_onnx: Path) -> None:
    with pytest.raises(faults.OutputFormError) as caught:
        profiler.profile(FakeDevice(text="line\n" * 50), tiny_onnx)
    assert caught.value.text == "line\n" * 50


def test_a_model_that_crashes_its_runtime_names_the_signal(tmp_path: Path, tiny_onnx: Path) -> None:
    class Crashing(LocalDevice):
        def python(self) -> tuple[str, ...]:
            return (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGABRT)")

    with pytest.raises(faults.ModelCrashError, match="SIGABRT") as caught:
        profiler.profile(Crashing(), tiny_onnx)
    assert caught.value.signal == 6


def test_comparison_of_two_formats(tiny_onnx: Path, tiny_tflite: Path) -> None:
    c = profiler.compare(LocalDevice(), tiny_onnx, tiny_tflite, Settings(seconds=0.1))
    assert c["faster"] == "b" and c["ratio"] < 1 and c["ci95"][1] < 1
    assert len(c["a"]["latency_ms"]["samples"]) == len(c["b"]["latency_ms"]["samples"])


def test_a_copy_of_a_file_is_not_much_faster_than_itself(tiny_onnx: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(tiny_onnx.read_bytes())
    c = profiler.compare(LocalDevice(), tiny_onnx, copy, Settings(seconds=0.3))
    assert 0.5 < c["ratio"] < 2.0
    assert (c["faster"] is None) == (c["ci95"][0] <= 1 <= c["ci95"][1])


@pytest.mark.parametrize(
    ("a", "b", "faster", "said"),
    [
        ("tflite-int8", "tflite-fp32", "b", True),
        ("onnx-fp32", "onnx-qdq", "a", True),
        ("tflite-int8", "tflite-fp32", "a", False),
        ("tflite-int8", "tflite-fp32", None, False),
        ("tflite-int8", None, "b", False),
    ],
)
def test_int8_slower_than_float_is_a_named_warning(
    a: str | None, b: str | None, faster: str | None, said: bool
) -> None:
    warning = profiler.quantized_is_slower(a, b, faster)
    assert bool(warning) == said
    assert not said or str(warning).startswith(profiler.INT8_SLOWER)


def test_slow_int8_is_flagged_only_when_intervals_are_apart() -> None:
    def one(target: str, low: float, high: float) -> dict[str, Any]:
        facts = {
            "device": {"name": "d"},
            "target": target,
            "latency_ms": {"ci95": [low, high]},
            "warnings": [],
        }
        return dict(facts)

    slow, quick = one("tflite-int8", 2.0, 2.1), one("tflite-fp32", 1.0, 1.1)
    profiler.flag_slow_int8([slow, quick])
    assert len(slow["warnings"]) == 1 and quick["warnings"] == []
    near = one("tflite-int8", 1.05, 1.2)
    profiler.flag_slow_int8([near, quick, one("onnx-qdq", 9.0, 9.1)])
    assert near["warnings"] == []


def test_the_curve_of_a_long_run() -> None:
    points = [{"t_s": t, "ms": ms, "state": WARM} for t, ms in enumerate([10.0] * 10 + [20.0] * 10)]
    found = profiler.sustained(profiler.Figures(runtime={}, curve=points))
    assert found is not None
    assert found["retained"] == pytest.approx(0.5) and found["points"][0]["temperature_c"] == 61.5


def test_the_golden_sample_is_the_input_in_the_artifact_s_own_layout(tmp_path: Path) -> None:
    artifact = tmp_path / "m.tflite"
    artifact.write_bytes(b"x")
    spec = TensorSpec("x", (1, 2, 2, 3), "int8", "NHWC", 0.5, 3)
    described = Artifact(
        artifact, "tflite", "tflite-int8", (spec,), (), files.sha256(artifact), 1, golden="m.golden.npz"
    )
    manifest.write(described)
    assert profiler.golden_inputs(artifact, tmp_path) is None, "the file is not there"
    first = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    np.savez(tmp_path / "m.golden.npz", input_0=np.concatenate([first, first + 9]))
    path = profiler.golden_inputs(artifact, tmp_path)
    assert path is not None
    stored = np.load(path)["input_0"]
    # channel 1 at row 0, column 1 is 5: 5 / 0.5 + 3
    assert stored.shape == (1, 2, 2, 3) and stored.dtype == np.int8 and stored[0, 0, 1, 1] == 13


def test_stored_inputs_are_used(tiny_onnx: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.ones((1, 32), np.float32))
    assert profiler.profile(LocalDevice(), tiny_onnx, Settings(seconds=0), inputs=tmp_path / "in.npz")[
        "latency_ms"
    ]


def test_a_runtime_that_no_file_of_the_kind_runs_on_is_refused_by_name(
    tiny_onnx: Path, tiny_tflite: Path
) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown runtime of \.onnx files 'foo'; known: auto, onnx"):
        profiler.profile(LocalDevice(), tiny_onnx, Settings(runtime="foo"))
    with pytest.raises(UnknownNameError, match="did you mean 'tensorflow'"):
        profiler.profile(LocalDevice(), tiny_tflite, Settings(runtime="tensorflo"))
    with pytest.raises(UnknownNameError, match=r"\.tflite files 'onnxruntime'"):
        profiler.compare(LocalDevice(), tiny_onnx, tiny_tflite, Settings(runtime="onnxruntime"))
