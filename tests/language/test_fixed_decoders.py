"""Decoders in TFLite (signatures) and Core ML (states): in steps they give the teacher-forced logits."""

from __future__ import annotations

from pathlib import Path

import coremltools
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_models import ids, tiny

from edgecomp.compress.groupwise import QuantizeWeights
from edgecomp.errors import ArtifactError, InputError
from edgecomp.exporters import coreml_decoder, tflite_decoder
from edgecomp.exporters.coreml import CoreMLExporter
from edgecomp.language import cache, weights
from edgecomp.language.cached import CachedDecoder, StatefulDecoder, example
from edgecomp.language.decoder import from_transformers
from edgecomp.runtimes.coreml import ReferenceSession
from edgecomp.runtimes.coreml_decoder import CoreMLDecoder
from edgecomp.runtimes.litert_decoder import LiteRTDecoder
from edgecomp.spec import Candidate, Data, TensorSpec


def candidate(kind: str, *, four: bool = False) -> Candidate:
    begun = Candidate(from_transformers(tiny(kind)), (TensorSpec("ids", (1, 24), "int64"),))
    return QuantizeWeights(method="rtn", narrow=True)(begun, Data()) if four else begun


@torch.no_grad()
def off(found: Candidate, decoder: LiteRTDecoder | CoreMLDecoder, first: int) -> float:
    """Largest difference from the decoder with restored weights, as a share of its largest logit."""
    given = ids()
    parts = [decoder.step(given[:first]), *(decoder.step(given[i : i + 1]) for i in range(first, 24))]
    expected = weights.of(found).restored()(torch.from_numpy(given)[None])[0].numpy()
    return float(np.abs(np.concatenate(parts) - expected).max() / np.abs(expected).max())


def tflite(found: Candidate, path: Path, target: str) -> LiteRTDecoder:
    tflite_decoder.export(found, weights.of(found), path, target=target, room=40, chunk=6)
    return LiteRTDecoder(path, 40)


@pytest.mark.parametrize("kind", ["llama-scaled", "qwen3", "gemma3"])
def test_tflite_float(kind: str, tmp_path: Path) -> None:
    found = candidate(kind)
    assert off(found, tflite(found, tmp_path / "m.tflite", "tflite-fp32"), 13) < 1e-5


@pytest.mark.parametrize("kind", ["qwen2"])
def test_tflite_four_bits(kind: str, tmp_path: Path) -> None:
    """Activations become int8 at run time in LiteRT's 4-bit kernels."""
    found = candidate(kind, four=True)
    decoder = tflite(found, tmp_path / "m.tflite", "tflite-int4")
    assert off(found, decoder, 13) < 0.05
    decoder.reset()
    assert off(found, decoder, 6) < 0.05


def small(kind: str, storage: cache.Storage) -> tuple[Candidate, cache.CacheScales | None]:
    found = candidate(kind)
    samples = [torch.from_numpy(ids(24, seed))[None] for seed in range(4)]
    return found, cache.scales_from(weights.of(found).decoder, samples, storage)


@torch.no_grad()
def with_small_cache(
    found: Candidate, storage: cache.Storage, scales: cache.CacheScales | None
) -> np.ndarray:
    """Teacher-forced logits [24, vocabulary] of torch, keys and values rounded as the cache keeps them."""
    decoder = weights.of(found).decoder
    module = CachedDecoder(decoder, 24, 40, storage, scales)
    empty = example(decoder.architecture, 24, 40, storage)[2:]
    return module(torch.from_numpy(ids())[None], torch.zeros(1, dtype=torch.int64), *empty)[0][0].numpy()


@pytest.mark.parametrize("storage, near, smaller", [("int8", 0.03, 4), ("int4", 0.4, 8)])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_tflite_keeps_a_cache_of_few_bits(
    kind: str, storage: cache.Storage, near: float, smaller: int, tmp_path: Path
) -> None:
    found, scales = small(kind, storage)
    path = tmp_path / "m.tflite"
    tflite_decoder.export(
        found, weights.of(found), path, target="tflite-fp32", room=40, chunk=6, storage=storage, scales=scales
    )  # fmt: skip
    decoder = LiteRTDecoder(path, 40)
    assert off(found, decoder, 13) < near
    decoder.reset()
    parts = [decoder.step(ids()[:13]), *(decoder.step(ids()[i : i + 1]) for i in range(13, 24))]
    expected = with_small_cache(found, storage, scales)
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-5 * np.abs(expected).max())
    a = weights.of(found).decoder.architecture
    assert decoder.cache_bytes == 4 * 2 * a.layers * a.kv_heads * 40 * a.head_width // smaller


@settings(max_examples=30, deadline=None)
@given(integers=arrays(np.int8, (3, 8), elements=st.integers(-7, 7)))
def test_packed_integers_come_back(integers: np.ndarray) -> None:
    given_ = torch.from_numpy(integers).float()
    for storage in ("int8", "int4"):
        assert torch.equal(cache.unpacked(cache.packed(given_, storage), storage), given_)  # type: ignore[arg-type]
    assert cache.packed(given_, "int4").shape == (3, 4)


def test_tflite_float_activations(tmp_path: Path) -> None:
    found, path = candidate("qwen2", four=True), tmp_path / "m.tflite"
    tflite_decoder.export(
        found, weights.of(found), path, target="tflite-int4", room=40, chunk=6, activations="float"
    )
    assert off(found, LiteRTDecoder(path, 40), 13) < 1e-5


def test_signatures_share_their_weights(tmp_path: Path) -> None:
    found = candidate("llama")
    tflite(found, tmp_path / "m.tflite", "tflite-fp32")
    size = 4 * sum(p.numel() for p in found.module.parameters())
    assert (tmp_path / "m.tflite").stat().st_size < 1.3 * size + 60_000


@pytest.mark.parametrize("kind, four", [("llama", False), ("gemma3", True)])
def test_coreml_states(kind: str, four: bool, tmp_path: Path) -> None:
    """The reference executor rounds to float16 after every operation, as Core ML's units do."""
    found, path = candidate(kind, four=four), tmp_path / "m.mlpackage"
    target = "coreml-int4" if four else "coreml-fp16"
    coreml_decoder.export(found, weights.of(found), path, target=target, room=32, chunk=6)
    decoder = CoreMLDecoder(path, 32)
    assert off(found, decoder, 13) < 0.01
    a = found.original.architecture if found.original is not None else found.module.architecture
    assert decoder.cache_bytes == 2 * 2 * a.layers * a.kv_heads * 32 * a.head_width
    decoder.reset()
    assert off(found, decoder, 20) < 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # coremltools' own folders
@torch.no_grad()
def test_coreml_functions_are_those_of_coremltools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages of one function each, joined by coremltools: ours has their description and results."""
    found = candidate("llama")
    for chunk in (1, 6):
        module = StatefulDecoder(weights.of(found).decoder, 16, chunk)
        inputs = (TensorSpec("ids", (1, chunk), "int64"), TensorSpec("position", (1,), "int64"))
        CoreMLExporter("coreml-fp16", states=module.states).export(
            Candidate(module.eval(), inputs), Data(), tmp_path / f"{chunk}.mlpackage"
        )
    both = coremltools.utils.MultiFunctionDescriptor()
    both.add_function(str(tmp_path / "1.mlpackage"), "main", "decode")
    both.add_function(str(tmp_path / "6.mlpackage"), "main", "prefill")
    both.default_function_name = "decode"
    coremltools.utils.save_multifunction(both, str(tmp_path / "theirs.mlpackage"))
    path = tmp_path / "ours.mlpackage"
    coreml_decoder.export(found, weights.of(found), path, target="coreml-fp16", room=16, chunk=6)
    ours, theirs = (coremltools.utils.load_spec(str(p)) for p in (path, tmp_path / "theirs.mlpackage"))
    assert ours.specificationVersion == theirs.specificationVersion
    for spec in (ours, theirs):
        spec.description.ClearField("metadata")
    assert ours.description == theirs.description
    assert set(ours.mlProgram.functions) == set(theirs.mlProgram.functions) == {"decode", "prefill"}
    sizes = [next(p.rglob("weight.bin")).stat().st_size for p in (path, tmp_path / "1.mlpackage")]
    assert sizes[0] < 1.05 * sizes[1], "the weights are there once"
    calls: list[tuple[int, ...]] = []
    run = ReferenceSession.run

    def counted(session: ReferenceSession, arrays: list[np.ndarray]) -> list[np.ndarray]:
        calls.append(arrays[0].shape)
        return run(session, arrays)

    monkeypatch.setattr(ReferenceSession, "run", counted)
    steps = [CoreMLDecoder(p, 16).step(ids(14)) for p in (path, tmp_path / "theirs.mlpackage")]
    np.testing.assert_array_equal(steps[0], steps[1])
    assert calls == 2 * [(1, 6), (1, 6), (1, 1), (1, 1)], "a prompt is read in chunks"


def test_coreml_norms_hold_what_float16_cannot_square(tmp_path: Path) -> None:
    """Activations of language models reach tens of thousands; float16 ends at 65,504."""
    found, path = candidate("llama-scaled"), tmp_path / "m.mlpackage"
    with torch.no_grad():
        found.module.embed.weight.mul_(4000.0)
    coreml_decoder.export(found, weights.of(found), path, target="coreml-fp16", room=32, chunk=1)
    assert off(found, CoreMLDecoder(path, 32), 5) < 0.02


@pytest.mark.parametrize("storage, near, smaller", [("int8", 0.03, 4), ("int4", 0.4, 8)])
def test_coreml_takes_a_cache_of_few_bits(
    storage: cache.Storage, near: float, smaller: int, tmp_path: Path
) -> None:
    """States are float16 only, so the cache comes in and new rows go out as int8 arrays."""
    found, scales = small("llama", storage)
    path = tmp_path / "m.mlpackage"
    coreml_decoder.export(
        found, weights.of(found), path, target="coreml-fp16", room=40, chunk=6, storage=storage,
        scales=scales,
    )  # fmt: skip
    decoder = CoreMLDecoder(path, 40)
    assert off(found, decoder, 5) < near
    decoder.reset()
    expected = with_small_cache(found, storage, scales)
    found_logits = np.concatenate([decoder.step(ids()[:13]), decoder.step(ids()[13:])])
    wrong = np.abs(found_logits - expected).max(axis=1) / np.abs(expected).max()
    assert np.median(wrong) < 0.01  # float16 turns an integer of the cache here and there
    a = weights.of(found).decoder.architecture
    assert decoder.cache_bytes == 4 * 2 * a.layers * a.kv_heads * 40 * a.head_width // smaller


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    found = candidate("llama")
    decided = weights.of(found)
    for module, suffix, int4 in (
        (tflite_decoder, "tflite", "tflite-int4"), (coreml_decoder, "mlpackage", "coreml-int4"),
    ):  # fmt: skip
        path = tmp_path / f"m.{suffix}"
        with pytest.raises(InputError, match="a cache of int8 needs scales"):
            target = int4.replace("int4", "fp32" if suffix == "tflite" else "fp16")
            module.export(found, decided, path, target=target, room=32, storage="int8")
        with pytest.raises(InputError, match="quantize-weights"):
            module.export(found, decided, path, target=int4, room=32)
        with pytest.raises(InputError, match="is written as"):
            module.export(found, decided, path, target=f"{suffix}-int16x8", room=32)


def test_more_tokens_than_the_cache_holds_are_refused(tmp_path: Path) -> None:
    found = candidate("llama")
    tflite_decoder.export(
        found, weights.of(found), tmp_path / "m.tflite", target="tflite-fp32", room=16, chunk=4
    )
    with pytest.raises(InputError, match="24 tokens do not fit a cache of 16"):
        LiteRTDecoder(tmp_path / "m.tflite", 16).step(ids())
    with pytest.raises(ArtifactError, match="no artifact"):
        LiteRTDecoder(tmp_path / "none.tflite", 16)
