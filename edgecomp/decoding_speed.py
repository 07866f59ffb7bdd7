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
    tokens written after it. `peak_rss_bytes`: of the process while it did both, weights and cache included.
    `energy_per_token_mj`: of writing, where the device has a sensor. `instructions`: of one token written.
    """

    context: int
    new: int
    first_token_s: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_ms: float | None = None
    decode_tokens_per_s: float | None = None
    peak_rss_bytes: int | None = None
    energy_per_token_mj: float | None = None
    instructions: int | None = None
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

    The first call of a runtime is not counted: it allocates. Raises InputError for a context below 2, or
    where none fits the cache.
    """
    check(contexts, new, decoder.room)
    ids = np.random.default_rng(0).integers(0, vocabulary, max(contexts) + new)
    return [asdict(_one(decoder, ids, context, new, chunk)) for context in contexts]


def check(contexts: Sequence[int], new: int, room: int) -> None:
    """Raise InputError for a context below 2, or where none of them fits the cache with `new` tokens."""
    wrong = [c for c in contexts if c < 2]
    if wrong or new < 1:
        raise InputError(f"context {wrong[0] if wrong else new} is too short to measure; expected 2 or more")
    if min(contexts) + new > room:
        raise InputError(
            f"no context of {', '.join(map(str, contexts))} with {new} new tokens fits a cache of {room}; "
            f"give --context {max(room - new, 2)} or less, or export the decoder with more --room"
        )


def beyond(context: int, new: int, room: int) -> Speed:
    """The entry of a context that does not fit."""
    return Speed(context, new, reason=f"the cache holds {room} tokens, not {context + new}")


def _one(decoder: DecoderSession, ids: np.ndarray, context: int, new: int, chunk: int) -> Speed:
    if context + new > decoder.room:
        return beyond(context, new, decoder.room)
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
