"""Generation: sampling by hand-worked numbers, stops, streams, and the command line end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import KINDS, SENTENCES, Tokens, tokenizer_folder

from edgecomp import decoding
from edgecomp.cli import main
from edgecomp.errors import ArtifactError, DataError, InputError, ModelError
from edgecomp.language import bundle, checks
from edgecomp.language.architecture import Architecture
from edgecomp.language.bundle import Bundle
from edgecomp.language.generation import GenerationSession
from edgecomp.language.sampling import Sampler, Sampling, probabilities
from edgecomp.language.text import Text

LOGITS = np.log(np.array([0.1, 0.4, 0.3, 0.2]))


def test_greedy_takes_the_likeliest() -> None:
    assert Sampler(Sampling()).next(LOGITS) == 1


def test_temperature_top_k_and_top_p_by_hand() -> None:
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(temperature=1.0)), [0.1, 0.4, 0.3, 0.2])
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(temperature=0.5)), np.array([1, 16, 9, 4]) / 30)
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(1.0, top_k=2)), [0, 4 / 7, 3 / 7, 0])
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(1.0, top_p=0.6)), [0, 4 / 7, 3 / 7, 0])
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(1.0, top_p=0.3)), [0, 1, 0, 0])


@given(st.integers(0, 2**31), st.integers(0, 5), st.floats(0.05, 1.0))
def test_draws_follow_the_seed_and_stay_within_the_cut(seed: int, top_k: int, top_p: float) -> None:
    settings = Sampling(0.8, top_k, top_p, seed)
    drawn = [[Sampler(settings).next(LOGITS) for _ in range(3)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    odds = probabilities(LOGITS, settings)
    assert odds.sum() == pytest.approx(1) and all(odds[t] > 0 for t in drawn[0])


def test_frequencies_follow_the_probabilities() -> None:
    sampler = Sampler(Sampling(temperature=1.0))
    counts = np.bincount([sampler.next(LOGITS) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.4, 0.3, 0.2], atol=0.03)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_logits_are_an_error(bad: float) -> None:
    with pytest.raises(ModelError, match="logits hold NaN or Inf"):
        Sampler(Sampling()).next(np.array([0.0, bad]))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"max_tokens": 0}, {"stop": ("",)}]
)
def test_settings_are_checked(wrong: dict) -> None:
    with pytest.raises(InputError):
        Sampling(**wrong)


class Scripted:
    """A decoder that says given ids, whatever it is asked; the last is said for ever."""

    def __init__(self, said: list[int], room: int = 1000) -> None:
        self.said, self.room, self.position, self.cache_bytes = said, room, 0, 0
        self.prompt = 0

    def reset(self) -> None:
        self.position = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        if self.position == 0:
            self.prompt = len(ids)
        self.position += len(ids)
        logits = np.zeros((len(ids), 320))
        logits[-1, self.said[min(self.position - self.prompt, len(self.said) - 1)]] = 9.0
        return logits


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.read(tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


def saying(text: Text, words: str, room: int = 1000, end: bool = True) -> GenerationSession:
    a = Architecture("llama", 320, 8, 8, 1, 1, 1, 8, 1000, 1e-5)
    ids = [*text.ids(words).tolist(), *([1] if end else [])]
    return GenerationSession(Scripted(ids, room), text, Bundle(a, room, "float32", "", ends=(1,)))


def test_a_text_ends_at_its_end_token(text: Text) -> None:
    session = saying(text, SENTENCES[1])
    assert session.generate("Hello", Sampling(max_tokens=500)) == SENTENCES[1]
    assert session.ended == "end" and session.timing.new_tokens == len(text.ids(SENTENCES[1]))


def test_pieces_are_whole_characters_and_add_up(text: Text) -> None:
    pieces = list(saying(text, SENTENCES[1]).stream("Hello", Sampling(max_tokens=500)))
    assert "".join(pieces) == SENTENCES[1] and len(pieces) > 3
    assert not any("\ufffd" in p for p in pieces)


@given(st.integers(0, 60), st.integers(1, 12))
def test_a_stop_string_ends_the_text_before_it(start: int, size: int) -> None:
    words = SENTENCES[0]
    stop = words[start : start + size]
    session = saying(_TEXT[0], words)
    pieces = list(session.stream("x", Sampling(max_tokens=500, stop=(stop, "never there"))))
    assert "".join(pieces) == words[: words.find(stop)]
    assert session.ended == "stop"


_TEXT: list[Text] = []


@pytest.fixture(autouse=True, scope="module")
def _shared_text(text: Text) -> None:
    _TEXT.append(text)


def test_a_part_of_a_stop_string_is_given_out_when_the_text_goes_on(text: Text) -> None:
    session = saying(text, "the sea was calm")
    assert session.generate("x", Sampling(max_tokens=90, stop=("seal",))) == "the sea was calm"


def test_length_and_room_end_a_text(text: Text) -> None:
    session = saying(text, "a", end=False)
    session.generate("x", Sampling(max_tokens=5))
    assert session.ended == "length" and session.timing.new_tokens == 5
    session = saying(text, "a", room=6, end=False)
    session.generate("x", Sampling(max_tokens=50))
    assert session.ended == "room"


def test_prompts_that_do_not_fit_are_refused(text: Text) -> None:
    with pytest.raises(InputError, match="no tokens"):
        saying(text, "a").stream("")
    with pytest.raises(InputError, match="room for 4"):
        saying(text, "a", room=4).stream(SENTENCES[0])


def test_the_chat_template_is_the_models_own(text: Text) -> None:
    assert text.chat([{"role": "user", "content": "Hi"}]) == "<|user|>Hi\n<|assistant|>"
    with pytest.raises(InputError, match="no chat template"):
        Text(text.coder).chat([])
    with pytest.raises(InputError, match="refused"):
        Text(text.coder, "{{ raise_exception('roles must alternate') }}").chat([])


def test_a_tokenizer_of_another_model_is_refused(text: Text) -> None:
    with pytest.raises(ModelError, match="320 tokens, the model's vocabulary 300"):
        text.check(300)


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer at"):
        Text.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="no tokenizer of the tokenizers library"):
        Text.read(tmp_path)


def test_weights_cut_short_are_found(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, path)
    assert checks.weight_bytes(tmp_path) == path.stat().st_size
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ModelError, match="its header says"):
        checks.weight_bytes(tmp_path)
    path.write_bytes(b"abc")
    with pytest.raises(ModelError, match="cut short"):
        checks.weight_bytes(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-2.safetensors"}}')
    with pytest.raises(ModelError, match="lacks model-2.safetensors"):
        checks.weight_bytes(tmp_path)


def test_a_model_larger_than_memory_is_said_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "available_bytes", lambda: 2_000_000_000)
    checks.check_memory(1_000_000_000, "the model")
    with pytest.raises(ModelError, match="about 5.0 GB of memory, and 2.0 GB are free"):
        checks.check_memory(5_000_000_000, "the model")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """MODEL of a tiny Llama, by its file."""
    here = Path(__file__).parent
    source = tmp_path / "net.py"
    source.write_text(
        f"import sys\nsys.path.insert(0, {str(here)!r})\nfrom tiny_models import tiny\n"
        "from edgecomp.language.decoder import from_transformers\n"
        "def make():\n    return from_transformers(tiny('llama'))\n"
    )
    tokenizer_folder(tmp_path)
    np.save(tmp_path / "ids.npy", Tokens(8, 48).rows)
    return f"{source}:make"


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(w) for w in words])
    return result.exit_code, result.output


def test_from_a_model_to_text_on_the_command_line(model: str, tmp_path: Path) -> None:
    code, out = run(
        "quantize", model, "--groups", "--calib", tmp_path / "ids.npy", "--out", tmp_path / "q.pt"
    )
    assert code == 0, out
    code, out = run(
        "export-decoder", tmp_path / "q.pt", "--target", "onnx-int4", "--tokenizer", tmp_path,
        "--room", 96, "--cache", "int8", "--calib", tmp_path / "ids.npy", "--out", tmp_path / "out",
        "--json", tmp_path / "made.json",
    )  # fmt: skip
    assert code == 0, out
    check = json.loads((tmp_path / "made.json").read_text())["artifacts"][0]["check"]
    assert check["tokens"] == 88 and check["sqnr_db"] > 15
    artifact = tmp_path / "out" / "onnx-int4.onnx"
    code, out = run("generate", artifact, "The little", "--max-tokens", 6, "--json", tmp_path / "said.json")
    assert code == 0, out
    first = json.loads((tmp_path / "said.json").read_text())
    assert first["new_tokens"] <= 6 and first["ended"] in ("length", "end")
    code, out = run("generate", artifact, "The little", "--max-tokens", 6)
    assert code == 0 and first["text"] in out
    code, out = run("generate", artifact, "Hi", "--chat", "--temperature", 0.7, "--max-tokens", 3)
    assert code == 0, out


def test_greedy_text_is_what_the_decoder_itself_would_say(model: str, tmp_path: Path) -> None:
    import torch

    made = decoding.export(model, [decoding.Wish("onnx-fp32", room=64)], tmp_path, tmp_path / "out")
    assert made[0]["check"]["top1_agreement"] == 1.0
    session = GenerationSession.open(tmp_path / "out" / "onnx-fp32.onnx")
    said = session.generate("The ship", Sampling(max_tokens=8))
    ids = session.text.ids("The ship").tolist()
    decoder, begun = decoding.load(model).module, len(ids)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(decoder(torch.tensor([ids]))[0, -1].argmax()))
    assert said == session.text.text(ids[begun:])


def test_ids_that_the_model_does_not_have_are_named(model: str, tmp_path: Path) -> None:
    np.save(tmp_path / "wrong.npy", np.full((4, 32), 5000))
    wish = decoding.Wish("onnx-fp32", 64, "int8")
    with pytest.raises(DataError, match="holds id 5000; the model's vocabulary has 320"):
        decoding.export(model, [wish], tmp_path, tmp_path / "out", str(tmp_path / "wrong.npy"))
    words = ("quantize", model, "--groups", "--calib", tmp_path / "wrong.npy", "--out", tmp_path / "q.pt")
    code, out = run(*words)
    assert code == 2 and "holds id 5000; the embedding has 320 rows" in out


def test_bad_input_is_found_before_work(model: str, tmp_path: Path) -> None:
    wish = decoding.Wish
    with pytest.raises(InputError, match="trained for 128 tokens"):
        decoding.export(model, [wish("onnx-fp32", room=4096)], tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="needs calibration text"):
        decoding.export(model, [wish("onnx-fp32", storage="int8")], tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="no decoder is written for target 'tensorrt-int8'"):
        decoding.export(model, [wish("tensorrt-int8")], tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="needs weights in groups"):
        decoding.export(model, [wish("onnx-int4", room=64)], tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="cache is 'int2'"):
        wish("onnx-fp32", storage="int2")  # type: ignore[arg-type]


def test_an_artifact_without_its_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact at"):
        GenerationSession.open(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="no decoder with a cache"):
        GenerationSession.open(tmp_path / "m.onnx")
    bundle.path_of(tmp_path / "m.onnx").write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        GenerationSession.open(tmp_path / "m.onnx")


def test_every_supported_kind_has_a_tiny_model() -> None:
    assert {v[0].lower().removesuffix("text") for v in KINDS.values()} >= {
        "llama",
        "mistral",
        "qwen2",
        "gemma",
    }


def test_speed_and_memory_by_context(model: str, tmp_path: Path) -> None:
    decoding.export(model, [decoding.Wish("onnx-fp32", room=96)], tmp_path, tmp_path / "out")
    artifact = tmp_path / "out" / "onnx-fp32.onnx"
    words = ["--measure", "--context", 8, "--context", 64, "--context", 4096]
    code, out = run("generate", artifact, *words, "--json", tmp_path / "speed.json")
    assert code == 0, out
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["room"] == 96 and found["cache"] == "float32"
    short, longer, beyond = found["contexts"]
    assert short["context"] == 8 and longer["context"] == 64
    assert all(row["first_token_s"] > 0 and row["decode_ms"] > 0 for row in (short, longer))
    assert longer["prefill_tokens_per_s"] == pytest.approx(64 / longer["first_token_s"])
    assert beyond["decode_ms"] is None and beyond["peak_rss_bytes"] is None
    assert beyond["reason"] == "the cache holds 96 tokens, not 4112"
    code, out = run("generate", artifact, *words)
    assert code == 0 and "the cache holds 96 tokens" in out
    code, out = run("generate", artifact)
    assert code == 2 and "give the text to go on from" in out
    code, out = run("generate", artifact, "--measure", "--context", 1)
    assert code == 2 and "too short to measure" in out


def test_bits_under_a_budget_from_the_command_line_to_every_layer(model: str, tmp_path: Path) -> None:
    code, out = run(
        "quantize", model, "--groups", "--size-bytes", 40_000, "--set", "method=rtn",
        "--calib", tmp_path / "ids.npy", "--out", tmp_path / "q.pt", "--json", tmp_path / "q.json",
    )  # fmt: skip
    assert code == 0, out
    told = json.loads((tmp_path / "q.json").read_text())
    widths = next(note for note in told["notes"] if note.startswith("weights: "))
    assert "nats a token" in widths and int(widths.split("; ")[1].split()[0]) <= 40_000
    code, out = run(
        "export-decoder", tmp_path / "q.pt", "--target", "onnx-int4", "--tokenizer", tmp_path,
        "--room", 64, "--activations", "float", "--out", tmp_path, "--json", tmp_path / "made.json",
    )  # fmt: skip
    assert code == 0, out
    assert json.loads((tmp_path / "made.json").read_text())["artifacts"][0]["check"]["sqnr_db"] > 60
    code, out = run("inspect", tmp_path / "onnx-int4.onnx", "--json", tmp_path / "seen.json")
    assert code == 0, out
    seen = json.loads((tmp_path / "seen.json").read_text())
    stored = {round(w["bits"]) for w in seen["weights"] if "layers" in w["name"]}
    assert len(stored) > 1
