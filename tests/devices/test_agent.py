"""The agent as a program: what it prints, what it refuses, and that it is small and stands alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_artifacts import write_mixed_onnx

from edgecomp.devices import agent
from edgecomp.devices.transport import AGENT
from edgecomp.numerics import statistics
from edgecomp.runtimes.onnxruntime import OnnxRuntime

QUICK = ("--seconds", "0", "--warmup-seconds", "0.5")


def run(*words: str | Path) -> tuple[list[dict[str, Any]], int]:
    argv = [sys.executable, str(AGENT), *[str(word) for word in words]]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode


def of(events: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(event for event in events if event["event"] == name)


def test_it_is_one_small_file() -> None:
    assert AGENT.stat().st_size < 50_000


@pytest.mark.parametrize("version", ["3.9", "3.13"])
def test_its_syntax_is_old_and_new_python(version: str) -> None:
    import ast

    ast.parse(AGENT.read_text(), feature_version=tuple(int(n) for n in version.split(".")))


def test_an_onnx_file_is_measured(tiny_onnx: Path) -> None:
    events, code = run("profile", tiny_onnx, "--runs", "60", "--op-runs", "3", *QUICK)
    assert code == 0 and events[-1]["event"] == "done"
    assert of(events, "runtime")["version"] == onnxruntime.__version__
    samples = [ms for event in events if event["event"] == "samples" for ms in event["ms"]]
    assert len(samples) == 60 and min(samples) > 0
    init, memory = of(events, "init"), of(events, "memory")
    assert 0 < init["before"]["rss"] <= init["after"]["rss"] <= memory["peak"]
    ops = of(events, "ops")["ops"]
    assert sorted(op["type"] for op in ops) == ["MatMul"] * 3 + ["Relu"] * 3
    assert all(op["ms"] >= 0 and op["placed_on"] == "cpu" for op in ops)


def test_a_tflite_file_is_measured_and_the_op_that_xnnpack_left_is_named(tiny_tflite: Path) -> None:
    events, code = run("profile", tiny_tflite, "--runs", "5", *QUICK)
    assert code == 0
    assert of(events, "init")["accelerator"] == "xnnpack"
    places = [(op["type"], op["placed_on"], op["ms"]) for op in of(events, "ops")["ops"]]
    assert places == [("TANH", "xnnpack", None), ("CUMSUM", "cpu", None), ("TANH", "xnnpack", None)]


def test_without_accelerators_every_op_is_on_the_cpu(tiny_tflite: Path) -> None:
    events, _ = run("profile", tiny_tflite, "--runs", "5", "--accelerator", "none", *QUICK)
    assert {op["placed_on"] for op in of(events, "ops")["ops"]} == {"cpu"}


def test_at_least_the_seconds_are_used(tiny_onnx: Path) -> None:
    events, _ = run("profile", tiny_onnx, "--runs", "1", "--seconds", "0.3", "--warmup-seconds", "0")
    samples = [ms for event in events if event["event"] == "samples" for ms in event["ms"]]
    assert len(samples) == of(events, "after")["runs"] > 1
    assert sum(samples) < 2000


def test_two_models_take_turns(tiny_onnx: Path, tiny_tflite: Path) -> None:
    events, code = run("profile", tiny_onnx, "--against", tiny_tflite, "--runs", "20", *QUICK)
    counts = [
        sum(len(e["ms"]) for e in events if e["event"] == "samples" and e["model"] == i) for i in (0, 1)
    ]
    assert code == 0 and counts == [20, 20]


def test_a_long_run_gives_a_curve(tiny_onnx: Path) -> None:
    events, _ = run("profile", tiny_onnx, "--runs", "1", "--sustain", "2.1", *QUICK)
    points = [event for event in events if event["event"] == "curve"]
    assert len(points) == 3 and points[0]["ms"] > 0 and points[-1]["t_s"] > 2


def test_marks_time_nothing(tiny_onnx: Path) -> None:
    events, code = run("profile", tiny_onnx, "--marks", "3")
    assert code == 0 and of(events, "mark")["runs"] == 3
    assert not [event for event in events if event["event"] in ("samples", "after")]


def test_inference_on_stored_inputs_is_the_runtime_s_own(
    tiny_onnx: Path, tiny_tflite: Path, tmp_path: Path
) -> None:
    x = np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)
    np.savez(tmp_path / "in.npz", x=x)
    _, code = run("infer", tiny_onnx, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz")
    session = onnxruntime.InferenceSession(tiny_onnx)
    expected = np.concatenate([session.run(None, {"x": row[None]})[0] for row in x])
    assert code == 0 and np.array_equal(np.load(tmp_path / "out.npz")["r2"], expected)

    np.savez(tmp_path / "in.npz", x=x[:, :8])
    run("infer", tiny_tflite, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz")
    interpreter = Interpreter(str(tiny_tflite))
    interpreter.allocate_tensors()
    door, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    interpreter.set_tensor(door["index"], x[:1, :8])
    interpreter.invoke()
    found = np.load(tmp_path / "out.npz")[result["name"]]
    assert found.shape == (4, 8) and np.array_equal(found[:1], interpreter.get_tensor(result["index"]))


def test_a_file_that_mixes_8_and_16_bits_opens(tmp_path: Path) -> None:
    path = write_mixed_onnx(tmp_path / "mixed.onnx")
    events, code = run("profile", path, "--runs", "3", *QUICK)
    assert code == 0, events
    x = np.linspace(-4, 4, 16, dtype=np.float32).reshape(1, 2, 8)
    np.savez(tmp_path / "in.npz", x=x)
    run("infer", path, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz")
    expected = OnnxRuntime().open(path).run([x])[0]
    assert np.array_equal(np.load(tmp_path / "out.npz")["y"], expected) and np.ptp(expected) > 1


def test_wrong_inputs_are_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.zeros((1, 5), np.float32))
    events, code = run("profile", tiny_onnx, "--inputs", tmp_path / "in.npz")
    assert code == 2 and of(events, "error")["kind"] == "inputs"
    assert "(1, 5)" in of(events, "error")["message"]


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    (tmp_path / "bad.tflite").write_bytes(b"not a model")
    for name in ("bad.onnx", "bad.tflite"):
        events, code = run("profile", tmp_path / name)
        assert code == 2 and of(events, "error")["kind"] == "model"


def test_a_missing_runtime_is_named(tiny_tflite: Path) -> None:
    events, code = run("profile", tiny_tflite, "--runtime", "no_such_runtime")
    assert code == 3 and of(events, "error")["kind"] == "runtime-missing"
    assert "no_such_runtime" in of(events, "error")["message"]


def test_an_unknown_provider_is_named(tiny_onnx: Path) -> None:
    events, code = run("profile", tiny_onnx, "--accelerator", "warp")
    assert code == 3 and "no provider 'warp'" in of(events, "error")["message"]


def test_what_libraries_print_does_not_reach_the_protocol(tiny_tflite: Path) -> None:
    argv = [sys.executable, str(AGENT), "profile", str(tiny_tflite), "--runs", "1", *QUICK]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert all(line.startswith("{") for line in done.stdout.splitlines())


def test_random_inputs_are_valid() -> None:
    doors = [("a", [2, 3], "float32"), ("b", [4], np.int8), ("c", [50], "int64"), ("d", [9], "bool")]
    made = agent.arrays_for(doors, None)
    assert [(a.shape, a.dtype.name) for a in made] == [
        ((2, 3), "float32"),
        ((4,), "int8"),
        ((50,), "int64"),
        ((9,), "bool"),
    ]
    assert set(np.unique(made[2])) == {0, 1}


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=40))
def test_the_agent_s_warm_up_rule_is_that_of_numerics(samples: list[float]) -> None:
    assert agent.is_warm(samples) == statistics.is_warm(samples)


def test_delegated_ops_are_those_behind_the_delegate_s_outputs() -> None:
    nodes = [
        {"index": 0, "inputs": [0], "outputs": [1]},
        {"index": 1, "inputs": [1], "outputs": [2]},
        {"index": 2, "inputs": [2, 1], "outputs": [3]},
        {"index": 3, "inputs": [3], "outputs": [4]},
    ]
    assert agent.LiteRT._inside({"inputs": [1], "outputs": [3]}, nodes) == {1, 2}
