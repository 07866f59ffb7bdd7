"""MODEL as the folder of a causal model: what is wrong with it is said before its weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from tiny_models import Tokens, ids, tiny, tokenizer_folder

from edgecomp.cli import main
from edgecomp.errors import ModelError
from edgecomp.language import checks, folder
from edgecomp.language.decoder import from_transformers


@pytest.fixture
def place(tmp_path: Path) -> Path:
    found = tmp_path / "model"
    tiny("llama").save_pretrained(found)  # type: ignore[operator]
    tokenizer_folder(found)
    np.save(tmp_path / "ids.npy", Tokens(4, 24).rows)
    return found


@torch.no_grad()
def test_a_folder_gives_the_model_that_was_saved(place: Path) -> None:
    given = torch.from_numpy(ids())[None]
    expected = from_transformers(tiny("llama"))(given)
    assert torch.equal(folder.load(place)(given), expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(place)
    stored = {id(p): p.numel() for p in model.parameters()}  # a tied head is stored once
    assert checks.elements(place) == sum(stored.values())


def test_a_half_written_download_is_met_on_the_command_line(place: Path, tmp_path: Path) -> None:
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    words = ["quantize", str(place), "--groups", "--calib", str(tmp_path / "ids.npy"), "--out", "q.pt"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and "download it again" in result.output


def test_too_large_a_model_is_said_before_it_is_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "available_bytes", lambda: 100_000)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded")
    )
    with pytest.raises(ModelError, match=r"in float32 needs about .* GB of memory, and 0.0 GB are free"):
        folder.load(place)


def test_an_unsupported_architecture_is_named_before_its_weights_are_read(tmp_path: Path) -> None:
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="architecture 'gpt2' is not supported"):
        folder.load(tmp_path)
    with pytest.raises(ModelError, match="has no config.json"):
        folder.load(tmp_path / "none")


def test_from_a_folder_to_text(place: Path, tmp_path: Path) -> None:
    """The tokenizer is the folder's own."""
    words = ["export-decoder", str(place), "--target", "onnx-fp32", "--room", "64", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    artifact = str(tmp_path / "onnx-fp32.onnx")
    result = CliRunner().invoke(main, ["generate", artifact, "The", "--max-tokens", "4", "--json", "-"])
    assert result.exit_code == 0 and json.loads(result.stdout)["new_tokens"] <= 4
