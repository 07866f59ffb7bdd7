"""Perplexity over sliding windows, against sums worked out apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import ids, tiny

from edgecomp.errors import DataError, InputError, ModelError
from edgecomp.language.decoder import from_transformers
from edgecomp.language.perplexity import perplexity


class Forced:
    """The float decoder as a session that takes one whole window."""

    def __init__(self) -> None:
        self.decoder, self.room, self.position, self.cache_bytes = from_transformers(tiny("llama")), 64, 0, 0

    def reset(self) -> None:
        self.position = 0

    @torch.no_grad()
    def step(self, given: np.ndarray) -> np.ndarray:
        return self.decoder(torch.from_numpy(given)[None])[0].numpy()


class Uniform(Forced):
    def step(self, given: np.ndarray) -> np.ndarray:
        return np.zeros((len(given), 320))


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    found = perplexity(Uniform(), ids(40), window=16, stride=8)
    assert found.value == pytest.approx(320) and (found.window, found.stride) == (16, 8)
    assert found.tokens == 15 + 8 * 3


@torch.no_grad()
def test_every_token_is_counted_once_with_its_context() -> None:
    session, given = Forced(), ids(32)
    found = perplexity(session, given, window=16, stride=8)
    losses = []
    for start, first in ((0, 1), (8, 8), (16, 8)):
        part = torch.from_numpy(given[start : start + 16])
        logits = session.decoder(part[None])[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], part[1:], reduction="none")
        losses.append(loss[first - 1 :])
    expected = torch.cat(losses)
    assert found.tokens == len(expected) == 31
    assert found.value == pytest.approx(float(expected.mean().exp()), rel=1e-5)


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match="the text has 10 tokens, the window 16"):
        perplexity(Uniform(), ids(10), window=16)
    with pytest.raises(InputError, match="window is 100"):
        perplexity(Uniform(), ids(200), window=100)
    with pytest.raises(InputError, match="stride is 17"):
        perplexity(Uniform(), ids(40), window=16, stride=17)
    bad = Uniform()
    bad.step = lambda given: np.full((len(given), 320), np.nan)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="NaN"):
        perplexity(bad, ids(40), window=16)
