"""Text from a decoder on the emulated Arm machine over OpenSSH: the tokens of this machine, no time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import lab_build as build
import lab_machine as machine
import pytest
from click.testing import CliRunner

from edgecomp import decoding_on_device
from edgecomp.cli import main
from edgecomp.devices.ssh import SshDevice
from edgecomp.language.generation import GenerationSession
from edgecomp.language.sampling import Sampling

sys.path.insert(0, str(Path(__file__).parents[1] / "devices"))
from tiny_decoders import PROMPT, write

Make = Callable[..., SshDevice]
DRAWN = Sampling(temperature=0.9, top_k=60, top_p=0.95, seed=5, max_tokens=16)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(tmp_path_factory.mktemp("decoders"))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx-fp32", "tflite-fp32"])
def test_the_text_over_ssh_is_that_of_this_machine(
    ssh: Make, board: machine.Board, decoders: dict[str, Path], target: str
) -> None:
    expected = GenerationSession.open(decoders[target]).generate(PROMPT, DRAWN)
    pieces: list[str] = []
    device = ssh()
    found = decoding_on_device.generate(device, decoders[target], PROMPT, DRAWN, on_piece=pieces.append)
    assert found["text"] == expected == "".join(pieces) and len(pieces) > 1
    assert found["device"]["emulated"] and found["device"]["isa"] == "aarch64"
    for key in ("init_ms", "first_token_s", "decode_tokens_per_s", "peak_rss_bytes", "energy_per_token_mj"):
        assert found[key] is None
    assert found["warnings"][0].startswith("emulated:")
    left = device.run(["sh", "-c", "find . -name request.json"], 30).stdout
    assert left == "" and board.processes() == []


@pytest.mark.slow
def test_a_stop_string_ends_the_work_on_the_board(
    ssh: Make, board: machine.Board, decoders: dict[str, Path]
) -> None:
    artifact = decoders["onnx-fp32"]
    whole = GenerationSession.open(artifact).generate(PROMPT, DRAWN)
    how = Sampling(0.9, 60, 0.95, 5, 48, stop=(whole[2:4],))
    found = decoding_on_device.generate(ssh(), artifact, PROMPT, how)
    assert found["text"] == whole[: whole.find(whole[2:4])] and found["ended"] == "stop"
    assert board.processes() == []


@pytest.mark.slow
def test_the_command_counts_instructions_by_context(
    lab: None, decoders: dict[str, Path], tmp_path: Path
) -> None:
    book = ["--inventory", str(tmp_path / "d.toml")]
    add = ["devices", "add", "arm", "--qemu", str(build.ROOT), "--set", f"plugin={build.PLUGIN}", *book]
    assert CliRunner().invoke(main, add).exit_code == 0
    words = ["generate", str(decoders["onnx-fp32"]), "--measure", "--device", "arm", "--instructions"]
    asked = [*words, "--context", "8", "--context", "40", "--context", "500", "--json", "-", *book]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    short, longer, beyond = found["contexts"]
    assert short["instructions"] > 10_000 and longer["instructions"] > short["instructions"]
    assert beyond["instructions"] is None and beyond["reason"].startswith("the cache holds 64")
    assert short["decode_ms"] is None and short["peak_rss_bytes"] is None
    assert found["warnings"][0].startswith("emulated:")
