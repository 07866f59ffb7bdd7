"""How fast a decoder reads a prompt and writes, and what memory it takes, by the length of its context."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgecomp.errors import InputError
from edgecomp.language.generation import DecoderSession, read
from edgecomp.meter import Meter

CONTEXTS = (512, 2048, 4096)


@dataclass(frozen=True)
class Speed:
    """One context. A figure that was not measured is None, and `reason` says why.

    `first_token_s`: reading the whole prompt, until its logits are there. `decode_ms`: the median of `new`
    tokens written after it. `peak_rss_bytes`: of this process while it did both, weights and cache included.
    """

    context: int
    new: int
    first_token_s: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_ms: float | None = None
    decode_tokens_per_s: float | None = None
    peak_rss_bytes: int | None = None
    reason: str = ""


def measure(
    decoder: DecoderSession,
    vocabulary: int,
    contexts: Sequence[int] = CONTEXTS,
    new: int = 16,
    chunk: int = 0,
) -> list[dict[str, Any]]:
    """One entry for each context, on seeded random tokens: speed does not depend on what they say.

    `chunk`: tokens that a decoder of fixed shape reads at once (0: any number).

    The first call of a runtime is not counted: it allocates. Raises InputError for a context below 2.
    """
    wrong = [c for c in contexts if c < 2]
    if wrong or new < 1:
        raise InputError(f"context {wrong[0] if wrong else new} is too short to measure; expected 2 or more")
    ids = np.random.default_rng(0).integers(0, vocabulary, max(contexts) + new)
    return [asdict(_one(decoder, ids, context, new, chunk)) for context in contexts]


def _one(decoder: DecoderSession, ids: np.ndarray, context: int, new: int, chunk: int) -> Speed:
    if context + new > decoder.room:
        return Speed(context, new, reason=f"the cache holds {decoder.room} tokens, not {context + new}")
    decoder.reset()
    decoder.step(ids[:2])
    with Meter() as meter:
        decoder.reset()
        began = time.perf_counter()
        read(decoder, ids[:context], chunk)
        first = time.perf_counter() - began
        times = []
        for token in ids[context : context + new]:
            began = time.perf_counter()
            decoder.step(np.array([token]))
            times.append(time.perf_counter() - began)
    median = statistics.median(times)
    return Speed(context, new, first, context / first, 1000 * median, 1 / median, meter.peak_rss_bytes)
