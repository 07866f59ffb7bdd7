"""The Mac's side with a benchmarker that replays, and the host's side with a device that does."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgecomp.devices import apple_agent
from edgecomp.devices.apple import AppleDevice
from edgecomp.devices.faults import ModelRefusedError
from edgecomp.devices.host import Request
from edgecomp.errors import InputError
from edgecomp.spec import CommandResult

ADDRESS = {"address": "me@mac"}


class MLNeuralEngineComputeDevice:
    """Named as coremltools names it."""


class Replay:
    """Answers as `coremltools...perf_utils.MLModelBenchmarker` does."""

    compute_units = SimpleNamespace(name="ALL")

    async def benchmark_load(self) -> Any:
        return SimpleNamespace(samples=[120.0])

    async def benchmark_predict(self, iterations: int = 1, warmup: bool = False) -> Any:
        return SimpleNamespace(samples=[2.0] * iterations)

    async def benchmark_operation_execution(self, iterations: int, warmup: bool) -> list[Any]:
        usage = SimpleNamespace(preferred_compute_device=MLNeuralEngineComputeDevice())
        spec = SimpleNamespace(type="conv", outputs=[SimpleNamespace(name="y")])
        measured = SimpleNamespace(samples=[0.5, 0.7, 0.6])
        unknown = SimpleNamespace(spec=spec, compute_device_usage=None, measurement=None)
        return [SimpleNamespace(spec=spec, compute_device_usage=usage, measurement=measured), unknown]


def test_the_benchmarker_s_answers_become_events(capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(apple_agent.measure(Replay(), 3, per_op=True))
    init, first, samples, ops = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (init["ms"], init["accelerator"], first["ms"], samples["ms"]) == (120.0, "all", 2.0, [2.0] * 3)
    assert ops["ops"] == [
        {"name": "y", "type": "conv", "ms": 0.6, "placed_on": "ane"},
        {"name": "y", "type": "conv", "ms": None, "placed_on": "unknown"},
    ]


class ReplayedMac(AppleDevice):
    text = ""
    commands: list[tuple[str, ...]]

    def run(self, argv: Any, timeout_s: float, on_line: Any = None) -> CommandResult:
        self.commands = [*getattr(self, "commands", []), tuple(argv)]
        for line in self.text.splitlines():
            on_line(line)
        return CommandResult(tuple(argv), 0, self.text, "")

    def stage(self, source: Path) -> str:
        return f"/staged/{source.name}"


def test_a_package_goes_to_the_benchmarker() -> None:
    device = ReplayedMac.from_settings("mac", ADDRESS | {"target": "iphone", "team": "T1"})
    events: list[dict[str, Any]] = [
        {"event": "runtime", "model": 0, "name": "coreml", "version": "9.0"},
        {"event": "init", "model": 0, "ms": 3.0, "accelerator": "all"},
        {"event": "samples", "model": 0, "ms": [1.0, 2.0]},
        {"event": "done"},
    ]
    device.text = "".join(json.dumps(event) + "\n" for event in events)
    found = device.measure(Request(Path("m.mlpackage"), runs=7, accelerator="ane"))[0]
    assert found.samples_ms == (1.0, 2.0) and found.runtime["accelerator"] == "all"
    words = " ".join(device.commands[0])
    assert "apple_agent.py /staged/m.mlpackage --target iphone --units ane --runs 7" in words
    assert words.endswith("--team T1")


def test_what_the_mac_refuses_is_told() -> None:
    device = ReplayedMac.from_settings("mac", ADDRESS)
    device.text = (
        '{"event": "error", "kind": "model", "message": "expected one attached iphone, found none"}\n'
    )
    with pytest.raises(ModelRefusedError, match="found none"):
        device.measure(Request(Path("m.mlpackage")))


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="expected one of mac, iphone, ipad"):
        AppleDevice.from_settings("mac", ADDRESS | {"target": "watch"})
    with pytest.raises(InputError, match="team=TEAM"):
        AppleDevice.from_settings("phone", ADDRESS | {"target": "iphone"})


def test_a_phone_must_be_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apple_agent.remote_device.Device, "get_connected_devices", lambda kind: [])
    with pytest.raises(LookupError, match="exactly one"):
        apple_agent.found_device("iphone")
    assert apple_agent.found_device("mac") is None
