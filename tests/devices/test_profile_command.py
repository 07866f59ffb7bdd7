"""`edgecomp profile` on this machine and on fakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgecomp.cli import profile
from edgecomp.devices.fake import FakeDevice
from edgecomp.devices.faults import DroppedError
from edgecomp.errors import InputError

QUICK = ["--seconds", "0.02"]


def invoke(*words: str | Path) -> Any:
    return CliRunner().invoke(profile.command, [str(word) for word in words], catch_exceptions=True)


def test_one_artifact_is_one_profile(tiny_onnx: Path) -> None:
    facts = json.loads(invoke(tiny_onnx, *QUICK, "--json", "-").stdout)
    assert facts["device"]["name"] == "local" and facts["latency_ms"]["p50"] > 0


def test_several_artifacts_are_a_list_and_a_table(tiny_onnx: Path, tiny_tflite: Path, tmp_path: Path) -> None:
    result = invoke(tiny_onnx, tiny_tflite, *QUICK, "--json", tmp_path / "p.json")
    facts = json.loads((tmp_path / "p.json").read_text())
    assert len(facts["profiles"]) == 2 and facts["failures"] == []
    assert "chain.onnx" in result.stdout and "xnnpack: 2 of 3 ops" in result.stdout


def test_comparison_says_who_is_faster(tiny_onnx: Path, tiny_tflite: Path) -> None:
    result = invoke("--compare", tiny_onnx, tiny_tflite, *QUICK)
    assert "chain.tflite is faster" in result.stdout and "95 % interval" in result.stdout


def test_nothing_to_do_is_wrong_usage(tiny_onnx: Path) -> None:
    assert isinstance(invoke().exception, InputError)
    assert isinstance(invoke(tiny_onnx, "--compare", tiny_onnx, tiny_onnx).exception, InputError)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h", 3600), ("45", 45), (None, 0)]
)
def test_spans_of_time(text: str | None, seconds: float) -> None:
    assert profile.span(text) == seconds


def test_unreadable_spans_and_cores() -> None:
    with pytest.raises(InputError, match="30m"):
        profile.span("soon")
    with pytest.raises(InputError, match="core numbers"):
        profile.cores("a")
    assert profile.cores("2,3") == (2, 3)


def test_a_device_that_fails_does_not_end_the_others() -> None:
    def work(device: FakeDevice) -> list[dict[str, Any]]:
        if device.name == "b":
            raise DroppedError("gone")
        return [{"from": device.name}]

    results, failures = profile.each([FakeDevice(name=n) for n in "abc"], work)
    assert results == [{"from": "a"}, {"from": "c"}]
    assert failures == [{"device": "b", "kind": "DroppedError", "error": "gone"}]
