"""Our decoder against transformers, whole texts and token by token."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import KINDS, ids, tiny
from torch import nn

from edgecomp.errors import ModelError
from edgecomp.language.cached import CachedDecoder
from edgecomp.language.decoder import from_transformers


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_transformers(kind: str) -> None:
    model = tiny(kind)
    given = torch.from_numpy(ids())[None]
    expected = model(given).logits
    torch.testing.assert_close(from_transformers(model)(given), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_filled_in_steps_gives_the_same_logits(kind: str) -> None:
    decoder, given = from_transformers(tiny(kind)), torch.from_numpy(ids())[None]
    a = decoder.architecture
    cache = [torch.zeros(1, a.kv_heads, 40, a.head_width) for _ in range(2 * a.layers)]
    found, position = [], 0
    for count in [7] + [1] * 17:
        step = CachedDecoder(decoder, count, 40)
        logits, *new = step(given[:, position : position + count], torch.tensor([position]), *cache)
        for whole, part in zip(cache, new, strict=True):
            whole[:, :, position : position + count] = part
        found.append(logits)
        position += count
    torch.testing.assert_close(torch.cat(found, 1), decoder(given), rtol=1e-4, atol=1e-5)


def test_architectures_that_are_not_supported_are_named() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99)
    with pytest.raises(ModelError, match="'gpt2' is not supported"):
        from_transformers(transformers.GPT2LMHeadModel(config))
    with pytest.raises(ModelError, match="has no config"):
        from_transformers(nn.Linear(2, 2))


def test_a_variant_that_is_not_supported_is_named() -> None:
    config = transformers.LlamaConfig(mlp_bias=True, hidden_size=32, num_attention_heads=2, vocab_size=9)
    from edgecomp.language.architecture import read

    with pytest.raises(ModelError, match="mlp_bias"):
        read(config)
    config = transformers.LlamaConfig(hidden_act="relu", hidden_size=32, num_attention_heads=2, vocab_size=9)
    with pytest.raises(ModelError, match="activation 'relu'"):
        read(config)
