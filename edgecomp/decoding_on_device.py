"""Text from a decoder on a device, as it is made there, and its speed and energy by context length.

Tokenizer, chat template, stop strings and sampling are settled here; the device gets token ids.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgecomp import registry
from edgecomp.decoding_speed import CONTEXTS, Speed, beyond, check
from edgecomp.language import bundle as bundles
from edgecomp.language import cache
from edgecomp.language.bundle import Bundle
from edgecomp.language.generation import Pieces, Timing, check_prompt
from edgecomp.language.sampling import Sampling
from edgecomp.language.text import Text

NEW = 16
"""Tokens that are written after each context of a measurement."""


def generate(
    device: Any,
    artifact: Path,
    prompt: str,
    settings: Sampling | None = None,
    *,
    chat: bool = False,
    threads: int = 1,
    timeout_s: float = 600.0,
    on_piece: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The text that follows a prompt, written on a device; `on_piece` gets each piece as it is certain.

    Keys: `text`, `ended` (end, stop, length, room), `prompt_tokens`, `new_tokens`, `first_token_s` and
    `decode_tokens_per_s` by the device's clock, `energy_per_token_mj` of the tokens after the first,
    `cache_bytes`; `device`, `runtime`, `threads`, `init_ms`, `peak_rss_bytes`, `warnings` as a profile has.
    None: not measured, as every time of an emulated device.

    Raises InputError before anything is copied, or a branch of DeviceError.
    """
    settings = settings or Sampling()
    facts, text = _opened(artifact)
    ids = text.ids(text.chat([{"role": "user", "content": prompt}]) if chat else prompt)
    check_prompt(ids, facts.room)
    decoder = registry.load("profiling", "decoder")(device, artifact, threads=threads, timeout_s=timeout_s)
    decoder.check(_cache_bytes(facts, artifact))
    writing = _Writing(Pieces(text, settings.stop), on_piece, decoder.stop)
    request = _cache(facts) | {
        "prompt": ids.tolist(), "ends": list(facts.ends), "max_tokens": settings.max_tokens,
        "temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p,
        "seed": settings.seed,
    }  # fmt: skip
    decoder.run(request, writing.take)
    writing.finish()
    timing = Timing(len(ids), writing.new_tokens, *writing.seconds())
    real = not decoder.emulated
    described = decoder.described()
    return {
        "text": writing.said,
        "ended": "stop" if writing.pieces.stopped else decoder.of("ended")["reason"],
        "prompt_tokens": timing.prompt_tokens,
        "new_tokens": timing.new_tokens,
        "first_token_s": timing.first_s if real else None,
        "decode_tokens_per_s": timing.decode_tokens_per_s if real else None,
        "energy_per_token_mj": _energy(decoder) if real else None,
        "cache_bytes": _cache_bytes(facts, artifact),
        **described,
    }


class _Writing:
    """Takes the events of a text: shows its pieces, and asks for the end where a stop string is met."""

    def __init__(
        self, pieces: Pieces, on_piece: Callable[[str], None] | None, stop: Callable[[], None]
    ) -> None:
        self.pieces, self.said, self.new_tokens = pieces, "", 0
        self._on_piece, self._stop = on_piece, stop
        self._ms: list[float] = []

    def take(self, event: Any) -> None:
        if event["event"] != "token" or self.pieces.stopped:
            return
        self._ms.append(event["ms"])
        if event["id"] is None:
            return
        self.new_tokens += 1
        self._show(self.pieces.add(event["id"]))
        if self.pieces.stopped:
            self._stop()

    def finish(self) -> None:
        if not self.pieces.stopped:
            self._show(self.pieces.rest())

    def _show(self, piece: str) -> None:
        self.said += piece
        if piece and self._on_piece:
            self._on_piece(piece)

    def seconds(self) -> tuple[float | None, float]:
        """To the first token, and from there to the last."""
        if not self._ms:
            return None, 0.0
        return self._ms[0] / 1000, (self._ms[-1] - self._ms[0]) / 1000


def measure(
    device: Any,
    artifact: Path,
    contexts: Sequence[int] = CONTEXTS,
    *,
    threads: int = 1,
    timeout_s: float = 600.0,
    instructions: bool = False,
) -> dict[str, Any]:
    """Speed, peak memory and energy by context length, on seeded random tokens, in a process on a device.

    Keys: `room`, `cache`, `cache_bytes`, `contexts` (fields of `edgecomp.decoding_speed.Speed`; what does not
    fit is None, with the reason), and those of `generate` that tell of the device. `instructions`: count
    those of one token after each context (emulated devices). Raises as `generate` does.
    """
    facts, _ = _opened(artifact)
    check(contexts, NEW, facts.room)
    decoder = registry.load("profiling", "decoder")(device, artifact, threads=threads, timeout_s=timeout_s)
    decoder.check(_cache_bytes(facts, artifact))
    fitting = [c for c in contexts if c + NEW <= facts.room]
    request = _cache(facts) | {"new": NEW, "vocabulary": facts.architecture.vocabulary}
    counts = {c: decoder.instructions(request | {"contexts": [c]}) for c in fitting} if instructions else {}
    decoder.run(request | {"contexts": fitting[:1] if decoder.emulated else fitting})
    told = {e["context"]: (i, e) for i, e in enumerate(decoder.events) if e["event"] == "context"}
    rows = []
    for context in contexts:
        if context not in fitting:
            speed = beyond(context, NEW, facts.room)
        elif decoder.emulated:
            speed = Speed(context, NEW, instructions=counts.get(context), reason="the device is emulated")
        else:
            speed = _speed(decoder, *told[context])
        rows.append(asdict(speed))
    return {
        "room": facts.room,
        "cache": facts.storage,
        "cache_bytes": _cache_bytes(facts, artifact),
        "contexts": rows,
        **decoder.described(),
    }


def _speed(decoder: Any, place: int, event: Any) -> Speed:
    """An event `context` at `place` among the events; the one before it tells when writing began."""
    first, median, new = event["prefill_ms"] / 1000, statistics.median(event["ms"]), len(event["ms"])
    joules, power = event["joules"], decoder.between(place - 1, place)
    energy = None if power is None else power * sum(event["ms"]) / 1000 / new
    return Speed(
        event["context"],
        new,
        first,
        event["context"] / first,
        median,
        1000 / median,
        event["peak"],
        energy if joules is None else 1000 * joules / new,
    )


def _energy(decoder: Any) -> float | None:
    """Millijoules of a token after the first: a counter of the kernel, else the board's sensor."""
    after = decoder.of("after")
    steps, joules = after.get("runs"), after.get("joules")
    if not steps:
        return None
    if joules is not None:
        return float(1000 * joules / steps)
    places = [i for i, e in enumerate(decoder.events) if e["event"] == "token"]
    power = decoder.between(places[0], places[-1])
    seconds = (decoder.events[places[-1]]["ms"] - decoder.events[places[0]]["ms"]) / 1000
    return None if power is None else float(power * seconds / steps)


def _opened(artifact: Path) -> tuple[Bundle, Text]:
    facts, text = bundles.read(artifact)
    text.check(facts.architecture.vocabulary)
    return facts, text


def _cache(facts: Bundle) -> dict[str, Any]:
    return {"room": facts.room, "chunk": facts.chunk}


def _cache_bytes(facts: Bundle, artifact: Path) -> int:
    """Of the cache at full room. Core ML's states are float16."""
    a = facts.architecture
    values = 2 * a.layers * a.kv_heads * a.head_width * facts.room
    bits = 16 if artifact.suffix == ".mlpackage" and facts.storage == "float32" else cache.BITS[facts.storage]
    return values * bits // 8
