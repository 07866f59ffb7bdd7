"""Text from a decoder, token by token, on any runtime that keeps its cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from edgecomp import registry
from edgecomp.errors import InputError
from edgecomp.language import bundle as bundles
from edgecomp.language.bundle import Bundle
from edgecomp.language.sampling import Sampler, Sampling
from edgecomp.language.text import Text

_PIECE = 256
_UNFINISHED = "\ufffd"
"""What a tokenizer gives for the first bytes of a character whose last bytes are not there yet."""


class DecoderSession(Protocol):
    """An opened decoder of any format. `position`: tokens in its cache."""

    position: int
    room: int

    @property
    def cache_bytes(self) -> int: ...

    def reset(self) -> None: ...

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits [n, vocabulary] of the tokens `ids` [n], which join the cache."""
        ...


@dataclass
class Timing:
    """Seconds and tokens of one generation. `first_s`: from the call to the first new token."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_s: float | None = None
    decode_s: float = 0.0

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None when fewer than two tokens were made: the first is the prefill's."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s else None


@dataclass
class GenerationSession:
    """A decoder with its tokenizer. `timing`: of the last generation. `ended`: why it stopped."""

    decoder: DecoderSession
    text: Text
    facts: Bundle
    timing: Timing = field(default_factory=Timing)
    ended: str = ""

    @classmethod
    def open(cls, artifact: Path, *, threads: int = 1) -> GenerationSession:
        """Open an artifact that `export-decoder` wrote. Raises ArtifactError, MissingError or ModelError."""
        facts, text = bundles.read(artifact)
        text.check(facts.architecture.vocabulary)
        factory = registry.load("decoder_runtimes", registry.format_of(artifact.suffix))
        return cls(factory(artifact, facts.room, threads), text, facts)

    def generate(self, prompt: str, settings: Sampling | None = None) -> str:
        """The text that follows the prompt."""
        return "".join(self.stream(prompt, settings))

    def chat(self, messages: Sequence[Mapping[str, str]], settings: Sampling | None = None) -> Iterator[str]:
        """The answer to messages (`role`, `content`), in pieces, by the model's own template."""
        return self.stream(self.text.chat(messages), settings)

    def stream(self, prompt: str, settings: Sampling | None = None) -> Iterator[str]:
        """The text that follows the prompt, in pieces as soon as each is certain.

        Raises InputError when the prompt is empty or does not fit the cache with one new token.
        """
        settings = settings or Sampling()
        ids = self.text.ids(prompt)
        check_prompt(ids, self.decoder.room)
        return self._pieces(ids, settings)

    def _pieces(self, prompt: np.ndarray, settings: Sampling) -> Iterator[str]:
        pieces = Pieces(self.text, settings.stop)
        for token in self._tokens(prompt, settings):
            if piece := pieces.add(token):
                yield piece
            if pieces.stopped:
                self.ended = "stop"
                return
        if rest := pieces.rest():
            yield rest

    def _tokens(self, prompt: np.ndarray, settings: Sampling) -> Iterator[int]:
        """New ids until an end token, the last that is wanted, or a full cache."""
        sampler, self.timing, self.ended = Sampler(settings), Timing(len(prompt)), "length"
        self.decoder.reset()
        began = time.perf_counter()
        logits = read(self.decoder, prompt, self.facts.chunk)
        for _ in range(settings.max_tokens):
            token = sampler.next(logits)
            now = time.perf_counter()
            if self.timing.first_s is None:
                self.timing.first_s = now - began
                first = now
            self.timing.decode_s = now - first
            if token in self.facts.ends:
                self.ended = "end"
                return
            self.timing.new_tokens += 1
            yield token
            if self.decoder.position >= self.decoder.room:
                self.ended = "room"
                return
            logits = self.decoder.step(np.array([token]))[-1]


def read(decoder: DecoderSession, prompt: np.ndarray, chunk: int = 0) -> np.ndarray:
    """Put a prompt [n] into the cache; the logits [vocabulary] after its last token.

    In pieces, so that the logits of a long prompt are never in memory at once (4,096 of 49,152: 0.8 GB).
    `chunk`: tokens that a decoder of fixed shape reads at once; a piece is a multiple of it.
    """
    piece = max(_PIECE // chunk, 1) * chunk if chunk else _PIECE
    last = np.zeros(0, np.float32)
    for start in range(0, len(prompt), piece):
        last = decoder.step(prompt[start : start + piece])[-1].copy()
    return last


def check_prompt(ids: np.ndarray, room: int) -> None:
    """Raise InputError when a prompt is empty or does not fit the cache with one new token."""
    if not len(ids):
        raise InputError("the prompt has no tokens; give at least one word")
    if len(ids) >= room:
        raise InputError(
            f"the prompt has {len(ids)} tokens, the cache room for {room} with the answer; "
            "shorten it, or export the decoder with more --room"
        )


class Pieces:
    """New tokens as text, each piece as soon as it is certain. `stopped`: a stop string was met."""

    def __init__(self, text: Text, stops: Sequence[str]) -> None:
        self.text, self.stops, self.stopped = text, stops, False
        self._made: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """The text that is certain with this token: "" where a character or a stop string may go on."""
        self._made.append(token)
        text = self.text.text(self._made)
        cut = _first_stop(text, self.stops)
        if cut is not None:
            self.stopped = True
            return text[len(self._given) : cut]
        safe = len(text) - _open_end(text, self.stops)
        if safe <= len(self._given) or text.endswith(_UNFINISHED):
            return ""
        piece, self._given = text[len(self._given) : safe], text[:safe]
        return piece

    def rest(self) -> str:
        """What was held back, when the text has ended otherwise."""
        return self.text.text(self._made)[len(self._given) :]


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins, or None."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places, default=None)


def _open_end(text: str, stops: Sequence[str]) -> int:
    """Characters at the end that may be the beginning of a stop string."""
    longest = max((len(s) for s in stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0
