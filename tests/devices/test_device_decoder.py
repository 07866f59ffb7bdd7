"""Generation through the agent: the tokens of this process, figures, what is refused before a copy."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import coremltools
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoders import PROMPT, ROOM, write

from edgecomp import decoding_on_device
from edgecomp.cli import main
from edgecomp.devices import agent, faults
from edgecomp.devices.decoder import DeviceDecoder
from edgecomp.devices.fake import FakeDevice
from edgecomp.devices.local import LocalDevice
from edgecomp.devices.transport import AGENT
from edgecomp.errors import InputError, MissingError
from edgecomp.language.generation import GenerationSession
from edgecomp.language.sampling import Sampling, probabilities
from edgecomp.runtimes import coreml_package
from edgecomp.runtimes.coreml import ReferenceSession
from edgecomp.runtimes.coreml_decoder import CoreMLDecoder

DRAWN = Sampling(temperature=0.9, top_k=60, top_p=0.95, seed=5, max_tokens=20)


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(tmp_path_factory.mktemp("decoders"))


@pytest.mark.parametrize("target", ["onnx-fp32", "tflite-fp32"])
@pytest.mark.parametrize("how", [Sampling(max_tokens=20), DRAWN])
def test_the_text_is_that_of_this_process(decoders: dict[str, Path], target: str, how: Sampling) -> None:
    session = GenerationSession.open(decoders[target])
    expected = session.generate(PROMPT, how)
    pieces: list[str] = []
    found = decoding_on_device.generate(LocalDevice(), decoders[target], PROMPT, how, on_piece=pieces.append)
    assert found["text"] == expected == "".join(pieces) and len(pieces) > 1
    assert (found["ended"], found["new_tokens"]) == (session.ended, session.timing.new_tokens)
    assert (found["prompt_tokens"], found["cache_bytes"]) == (15, session.decoder.cache_bytes)
    assert found["first_token_s"] > 0 and found["decode_tokens_per_s"] > 0 and found["peak_rss_bytes"] > 0
    assert found["device"]["name"] == "local" and found["runtime"]["version"]


def test_a_stop_string_ends_the_work_there(decoders: dict[str, Path]) -> None:
    artifact = decoders["onnx-fp32"]
    whole = GenerationSession.open(artifact).generate(PROMPT, replace(DRAWN, max_tokens=40))
    how = replace(DRAWN, max_tokens=40, stop=(whole[3:5],))
    session = GenerationSession.open(artifact)
    expected = session.generate(PROMPT, how)
    device = LocalDevice()
    found = decoding_on_device.generate(device, artifact, PROMPT, how)
    assert (found["text"], found["ended"]) == (expected, "stop")
    assert found["new_tokens"] == session.timing.new_tokens < 40
    assert not device._running


def test_a_full_cache_and_the_template(decoders: dict[str, Path]) -> None:
    artifact = decoders["tflite-fp32"]
    session = GenerationSession.open(artifact)
    how = replace(DRAWN, max_tokens=500)
    expected = "".join(session.chat([{"role": "user", "content": "Hi"}], how))
    found = decoding_on_device.generate(LocalDevice(), artifact, "Hi", how, chat=True)
    assert (found["text"], found["ended"]) == (expected, session.ended)
    assert found["prompt_tokens"] == 3 and found["new_tokens"] == session.timing.new_tokens


def test_what_shows_the_text_may_fail(decoders: dict[str, Path]) -> None:
    def broken(piece: str) -> None:
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        decoding_on_device.generate(LocalDevice(), decoders["onnx-fp32"], PROMPT, on_piece=broken)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=30),
    st.floats(0.1, 3), st.integers(0, 6), st.floats(0.05, 1), st.integers(0, 99),
)  # fmt: skip
def test_the_agent_draws_by_the_rule_of_sampling(
    logits: list[float], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    given_ = np.array(logits, np.float32)
    how = Sampling(temperature, top_k, top_p, seed)
    expected = probabilities(given_, how)
    np.testing.assert_array_equal(agent.probabilities(given_, temperature, top_k, top_p), expected)
    request = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    drawn = np.random.default_rng(seed).choice(len(expected), p=expected)
    assert agent.next_token(given_, request, np.random.default_rng(seed)) == drawn


def test_nan_logits_are_refused() -> None:
    with pytest.raises(agent.Refused, match="NaN or Inf"):
        agent.next_token(np.array([0.0, np.nan]), {"temperature": 0}, np.random.default_rng(0))


@pytest.mark.parametrize("target", ["onnx-fp32", "tflite-fp32"])
def test_speed_by_context(decoders: dict[str, Path], target: str) -> None:
    found = decoding_on_device.measure(LocalDevice(), decoders[target], [8, 40, 4096])
    short, longer, beyond = found["contexts"]
    assert (short["context"], longer["context"], short["new"]) == (8, 40, 16)
    for row in (short, longer):
        assert row["first_token_s"] > 0 and row["peak_rss_bytes"] > 10_000_000
        assert row["decode_tokens_per_s"] == pytest.approx(1000 / row["decode_ms"])
    assert longer["prefill_tokens_per_s"] == pytest.approx(40 / longer["first_token_s"])
    assert beyond["decode_ms"] is None and beyond["reason"] == "the cache holds 64 tokens, not 4112"
    assert found["cache"] == "int8" and found["device"]["kind"] == "local"


def fake(**changes: Any) -> FakeDevice:
    facts = {"python": "3.11.2", "runtimes": {"numpy": "2", "onnxruntime": "1", "ai-edge-litert": "2"}}
    return FakeDevice(kind="ssh", facts=facts | changes)


def copied_nothing(device: FakeDevice) -> bool:
    return device.commands == []


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"python": None}, faults.RuntimeMissingError, "no Python; install Python 3.9"),
        ({"runtimes": {"numpy": "2"}}, faults.RuntimeMissingError, "edgecomp devices setup fake"),
        ({"runtimes": {"onnxruntime": "1"}}, faults.RuntimeMissingError, "no NumPy"),
        ({"ram_bytes": 10_000}, InputError, "bytes of memory and device 'fake' has 10,000"),
    ],
)
def test_what_is_missing_there_is_told_before_a_copy(
    decoders: dict[str, Path], changes: dict[str, Any], error: type, words: str
) -> None:
    device = fake(**changes)
    with pytest.raises(error, match=words):
        decoding_on_device.generate(device, decoders["onnx-fp32"], PROMPT)
    assert copied_nothing(device)


def test_a_runtime_that_this_machine_lacks(decoders: dict[str, Path]) -> None:
    device = FakeDevice(kind="local", facts={"python": "3.11", "runtimes": {"numpy": "2"}})
    with pytest.raises(MissingError, match=r"pip install 'edgecomp\[tflite\]'"):
        decoding_on_device.generate(device, decoders["tflite-fp32"], PROMPT)


def test_what_does_not_fit_is_told_before_a_copy(decoders: dict[str, Path]) -> None:
    device = fake()
    for work in (
        lambda: decoding_on_device.generate(device, decoders["onnx-fp32"], "x" * ROOM),
        lambda: decoding_on_device.generate(device, decoders["onnx-fp32"], ""),
        lambda: decoding_on_device.measure(device, decoders["onnx-fp32"], [64, 512]),
        lambda: decoding_on_device.measure(device, decoders["onnx-fp32"], [16], instructions=True),
    ):
        with pytest.raises(InputError, match="room for 64|no tokens|fits a cache of 64|cannot count"):
            work()
    assert not [c for c in device.commands if c[0] == "env"]


def test_core_ml_names_the_way_out() -> None:
    package = Path("m.mlpackage")
    with pytest.raises(InputError, match="name a Mac"):
        DeviceDecoder(fake(os="Linux"), package).check(0)
    phone = fake(os="macOS 15")
    phone.target = "iphone"  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="generate on its Mac"):
        DeviceDecoder(phone, package).check(0)
    with pytest.raises(faults.RuntimeMissingError, match="pip install coremltools"):
        DeviceDecoder(fake(os="macOS 15"), package).check(0)


def token(number: int | None, ms: float) -> dict[str, Any]:
    return {"event": "token", "id": number, "ms": ms}


def replayed(device: FakeDevice, artifact: Path, **after: Any) -> dict[str, Any]:
    device.events = [
        {"event": "start", "pid": 7, "state": {}},
        {"event": "runtime", "name": "r", "version": "1"},
        {"event": "init", "ms": 9.0, "accelerator": "cpu", "before": {"rss": 1}, "after": {"rss": 2}},
        token(70, 250.0), token(71, 300.0), token(None, 350.0),
        {"event": "ended", "reason": "end"},
        {"event": "after", "state": {}, "joules": None, "runs": 2, "other_cores": None, **after},
        {"event": "memory", "rss": 3, "peak": 4, "pss": 2, "swapped": 0},
        {"event": "done"},
    ]  # fmt: skip
    return decoding_on_device.generate(device, artifact, PROMPT)


def test_times_and_energy_are_as_the_device_told_them(decoders: dict[str, Path]) -> None:
    found = replayed(fake(), decoders["onnx-fp32"], joules=0.5)
    assert (found["new_tokens"], found["first_token_s"]) == (2, 0.25)
    assert found["decode_tokens_per_s"] == pytest.approx(1 / 0.1)
    assert found["energy_per_token_mj"] == 250.0 and found["peak_rss_bytes"] == 4
    assert replayed(fake(), decoders["onnx-fp32"])["energy_per_token_mj"] is None


def test_no_emulated_time_is_told(decoders: dict[str, Path]) -> None:
    found = replayed(fake(emulated=True), decoders["onnx-fp32"], joules=0.5)
    for key in ("first_token_s", "decode_tokens_per_s", "energy_per_token_mj", "peak_rss_bytes", "init_ms"):
        assert found[key] is None
    assert found["new_tokens"] == 2 and found["warnings"][0].startswith("emulated:")


def run_agent(artifact: Path, request: Any, folder: Path) -> list[dict[str, Any]]:
    path = folder / "there" / "request.json"
    path.parent.mkdir()
    path.write_text(json.dumps(request))
    argv = [sys.executable, str(AGENT), "decode", str(artifact), "--request", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert not path.parent.exists(), "the prompt does not stay on the device"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_file_without_a_cache_is_refused_there(tiny_onnx: Path, tiny_tflite: Path, tmp_path: Path) -> None:
    for index, artifact in enumerate((tiny_onnx, tiny_tflite)):
        (tmp_path / str(index)).mkdir()
        request = {"room": 8, "chunk": 4, "prompt": [1]}
        last = run_agent(artifact, request, tmp_path / str(index))[-1]
        assert last["kind"] == "model" and "no decoder with a cache" in last["message"]


def invoke(*words: object) -> Any:
    return CliRunner().invoke(main, [str(w) for w in words])


def test_the_command_line(decoders: dict[str, Path], tmp_path: Path) -> None:
    artifact = decoders["onnx-fp32"]
    words = ("generate", artifact, PROMPT, "--temperature", 0.9, "--seed", 5, "--max-tokens", 9)
    here, there = invoke(*words), invoke(*words, "--device", "local")
    assert here.exit_code == there.exit_code == 0 and here.stdout == there.stdout != "\n"
    assert "tokens/s" in there.stderr
    out = tmp_path / "m.json"
    measured = invoke("generate", artifact, "--measure", "--context", 16, "--device", "local", "--json", out)
    assert measured.exit_code == 0 and "mJ/token" in measured.stdout
    assert json.loads(out.read_text())["contexts"][0]["decode_ms"] > 0


def test_wrong_usage(decoders: dict[str, Path], tmp_path: Path) -> None:
    artifact, book = decoders["onnx-fp32"], tmp_path / "none.toml"
    unknown = invoke("generate", artifact, PROMPT, "--device", "locla", "--inventory", book)
    assert unknown.exit_code == 2 and "did you mean 'local'?" in unknown.output
    assert invoke("generate", artifact, PROMPT, "--instructions").exit_code == 2
    assert "name one with --device" in invoke("generate", artifact, "--measure", "--instructions").output
    package = invoke("generate", tmp_path / "m.mlpackage", "--measure")
    assert package.exit_code == 2 and "no device's" in package.output


class Watched(FakeDevice):
    """A board whose sensor reads 2,000 mW, always."""

    @contextlib.contextmanager
    def watched(self) -> Iterator[Any]:
        yield SimpleNamespace(mean=lambda start, end: 2000.0 if start <= end else None)


def test_energy_of_a_board_s_sensor(decoders: dict[str, Path]) -> None:
    device = Watched(kind="jetson", facts=fake().facts)
    found = replayed(device, decoders["onnx-fp32"])
    assert found["energy_per_token_mj"] == pytest.approx(2000 * 0.1 / 2), "2 W for 100 ms and two tokens"
    device.events = [
        {"event": "start", "pid": 7, "state": {}},
        {"event": "reading", "context": 16}, {"event": "writing", "context": 16},
        {"event": "context", "context": 16, "prefill_ms": 80.0, "ms": [9.0, 10.0, 11.0], "joules": None,
         "peak": 5},
        {"event": "done"},
    ]  # fmt: skip
    row = decoding_on_device.measure(device, decoders["onnx-fp32"], [16])["contexts"][0]
    assert row["energy_per_token_mj"] == pytest.approx(2000 * 0.010)
    assert (row["first_token_s"], row["prefill_tokens_per_s"], row["decode_ms"]) == (0.08, 200.0, 10.0)


class PackageOnMac:
    """Answers as `coremltools.models.MLModel` does on a Mac: a function of the package, and a state."""

    def __init__(self, path: str, compute_units: Any = None, function_name: str | None = None) -> None:
        self.session = ReferenceSession(
            coreml_package.read(Path(path), function_name), rounds=True, threads=1
        )

    def make_state(self) -> ReferenceSession:
        return self.session

    def predict(
        self, given: dict[str, np.ndarray], state: ReferenceSession | None = None
    ) -> dict[str, np.ndarray]:
        if state is not None:
            self.session.share_states(state)
        found = self.session.run([given[spec.name] for spec in self.session.inputs])
        return {o.name: a for o, a in zip(self.session.outputs, found, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_the_agent_on_a_mac_writes_what_the_reference_executor_does(
    storage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = write(tmp_path, ("coreml-fp16",), storage)["coreml-fp16"]
    ids = np.arange(2, 13)
    expected = CoreMLDecoder(artifact, ROOM)
    monkeypatch.setattr(agent.sys, "platform", "darwin")
    monkeypatch.setattr(coremltools.models, "MLModel", PackageOnMac)
    options = agent.arguments(["decode", str(artifact), "--request", "r.json"])
    model = agent.open_model(options, str(artifact))
    model.load(str(artifact))
    assert model.prepare(ROOM, 4) == (0 if storage == "float32" else expected.cache_bytes)
    for part in (ids, ids[:1], ids[3:4]):
        np.testing.assert_array_equal(model.decode(part), expected.step(part))
    assert model.position == 13
