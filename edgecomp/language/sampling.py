"""From logits to the next token: greedy, temperature, top-k, top-p, with a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgecomp.errors import InputError, ModelError


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy. `top_k` 0 and `top_p` 1 leave every token in. `seed`: of the draws.

    `max_tokens`: new tokens at most. `stop`: strings that end the text; they are not part of it.
    Source of top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 128
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 100:
            raise InputError(f"temperature is {self.temperature}; expected 0 (greedy) or more, below 100")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected more than 0, at most 1")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}; expected at least 1")
        if "" in self.stop:
            raise InputError("an empty stop string would end every text at once; leave it out")


class Sampler:
    """Draws tokens; two samplers of one setting draw the same from the same logits."""

    def __init__(self, settings: Sampling) -> None:
        self.settings = settings
        self._generator = np.random.default_rng(settings.seed)

    def next(self, logits: np.ndarray) -> int:
        """The next token's id from logits [vocabulary]. Raises ModelError when they hold NaN or +Inf."""
        if not np.all(logits < np.inf):
            raise ModelError(
                "the logits hold NaN or Inf: the weights or the cache are damaged; export the decoder again, "
                "and check it with float32 weights and cache"
            )
        if self.settings.temperature == 0:
            return int(logits.argmax())
        odds = probabilities(logits, self.settings)
        return int(self._generator.choice(len(odds), p=odds))


def probabilities(logits: np.ndarray, settings: Sampling) -> np.ndarray:
    """float64 [vocabulary]: softmax(logits / temperature), cut to top-k, then to top-p, summing to 1."""
    scaled = logits.astype(np.float64) / settings.temperature
    if 0 < settings.top_k < len(scaled):
        least = np.partition(scaled, -settings.top_k)[-settings.top_k]
        scaled = np.where(scaled >= least, scaled, -np.inf)
    odds = np.exp(scaled - scaled.max())
    odds /= odds.sum()
    if settings.top_p < 1:
        order = np.argsort(-odds, kind="stable")
        before = np.cumsum(odds[order]) - odds[order]
        odds[order[before >= settings.top_p]] = 0.0
        odds /= odds.sum()
    return odds
