"""Decoders in ONNX: token by token they give the teacher-forced logits, with every kind of cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_models import KINDS, Tokens, ids, tiny

from edgecomp.compress.groupwise import QuantizeWeights
from edgecomp.errors import InputError, ModelError, UnsupportedOpError
from edgecomp.exporters.onnx_decoder import export
from edgecomp.language import cache, weights
from edgecomp.language.decoder import Decoder, from_transformers
from edgecomp.runtimes.onnxruntime_decoder import OnnxDecoder
from edgecomp.spec import Candidate, Data, TensorSpec


def candidate(kind: str, **settings: object) -> Candidate:
    begun = Candidate(from_transformers(tiny(kind)), (TensorSpec("ids", (1, 24), "int64"),))
    if not settings:
        return begun
    return QuantizeWeights(**settings)(begun, Data(calibration=Tokens()))  # type: ignore[arg-type]


def exported(found: Candidate, path: Path, room: int = 64, **settings: object) -> OnnxDecoder:
    decided = weights.of(found)
    target = "onnx-int4" if decided.plan else "onnx-fp32"
    export(found, decided, path, target=target, room=room, accuracy_level=1, **settings)  # type: ignore[arg-type]
    return OnnxDecoder(path, room)


def in_steps(decoder: OnnxDecoder, given: np.ndarray, first: int = 7) -> np.ndarray:
    decoder.reset()
    return np.concatenate(
        [decoder.step(given[:first]), *(decoder.step(given[i : i + 1]) for i in range(first, len(given)))]
    )


@torch.no_grad()
def forced(decoder: Decoder, given: np.ndarray) -> np.ndarray:
    return decoder(torch.from_numpy(given)[None])[0].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_float_weights(kind: str, tmp_path: Path) -> None:
    found = candidate(kind)
    decoder = exported(found, tmp_path / "m.onnx")
    np.testing.assert_allclose(in_steps(decoder, ids()), forced(found.module, ids()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_four_bit_weights(kind: str, tmp_path: Path) -> None:
    found = candidate(kind, method="rtn", symmetric=kind != "qwen3")
    decoder = exported(found, tmp_path / "m.onnx")
    expected = forced(weights.of(found).restored(), ids())
    np.testing.assert_allclose(in_steps(decoder, ids()), expected, rtol=1e-3, atol=2e-4)


def test_weights_that_scaling_changed_travel_too(tmp_path: Path) -> None:
    found = candidate("llama", method="gptq", scaling="awq", group_size=16)
    decided = weights.of(found)
    assert not torch.equal(decided.decoder.layers[0].before.weight, found.original.layers[0].before.weight)
    expected = forced(decided.restored(), ids())
    np.testing.assert_allclose(
        in_steps(exported(found, tmp_path / "m.onnx"), ids()), expected, rtol=1e-3, atol=2e-4
    )
    with torch.no_grad():
        given = torch.from_numpy(ids())[None]
        torch.testing.assert_close(decided.decoder(given), found.original(given), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("storage, worst", [("int8", 0.02), ("int4", 0.3)])
def test_a_cache_of_few_bits_is_smaller_and_close(
    tmp_path: Path, storage: cache.Storage, worst: float
) -> None:
    found = candidate("llama")
    samples = [torch.from_numpy(row)[None] for row in Tokens().rows]
    scales = cache.scales_from(found.module, samples, storage)
    decoder = exported(found, tmp_path / "m.onnx", storage=storage, scales=scales)
    expected = forced(found.module, ids())
    assert np.abs(in_steps(decoder, ids()) - expected).max() < worst * np.abs(expected).max()
    a = found.module.architecture
    assert decoder.cache_bytes == 2 * 2 * a.kv_heads * 64 * a.head_width * cache.BITS[storage] // 8
    whole, small = (cache.bytes_for(a, 2048, s) for s in ("float32", storage))
    assert whole / small > 0.98 * 32 / cache.BITS[storage]


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    exported(candidate("llama", method="rtn"), tmp_path / "m.onnx")
    names = [t.name for t in onnx.load(tmp_path / "m.onnx").graph.initializer]
    assert names.count("embed.weight_blocks") == 1 and not [n for n in names if n.startswith("head")]


def test_more_tokens_than_the_cache_holds_are_refused(tmp_path: Path) -> None:
    decoder = exported(candidate("llama"), tmp_path / "m.onnx", room=16)
    with pytest.raises(InputError, match="24 tokens do not fit a cache of 16"):
        decoder.step(ids())


def test_a_plan_with_activations_is_refused() -> None:
    from edgecomp.compress.ptq import Quantize

    found = candidate("llama")
    step = Quantize(samples=2, rounding="nearest")
    with pytest.raises(ModelError, match="quantize-weights"):
        weights.of(step(found, Data(calibration=Tokens(2))))


@torch.no_grad()
def test_key_scales_hold_at_positions_that_calibration_never_saw() -> None:
    decoder = candidate("llama").module
    scales = cache.scales_from(decoder, [torch.from_numpy(ids(12))[None]], "int8")
    assert scales is not None
    layer, x = decoder.layers[0], decoder.embedded(torch.from_numpy(ids(12))[None])
    for start in (0, 5, 60, 100):
        cos, sin = decoder.tables(0, torch.arange(start, start + 12))
        _, keys, _ = layer(x, cos, sin, torch.zeros(12, 12))
        largest = keys[0].abs().amax(1).reshape(-1).numpy()
        assert (largest <= 127.01 * scales.keys[0]).all()


def test_heads_that_onnx_runtime_does_not_take_are_refused(tmp_path: Path) -> None:
    a = replace(from_transformers(tiny("llama")).architecture, head_width=24)
    decoder = Decoder(a, [torch.ones(12) for _ in range(a.layers)])
    found = Candidate(decoder, (TensorSpec("ids", (1, 24), "int64"),))
    with pytest.raises(UnsupportedOpError, match="24 wide.*multiples of 16"):
        export(found, weights.of(found), tmp_path / "m.onnx", target="onnx-fp32", room=32)
