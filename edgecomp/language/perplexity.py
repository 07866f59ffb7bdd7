"""Perplexity of a text under a decoder of any runtime: windows that slide by a stride.

Source: "Perplexity of fixed-length models", documentation of Hugging Face transformers: every token is
counted once, seen by at least `window - stride` tokens before it (but for those of the first window).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgecomp.errors import DataError, InputError, ModelError
from edgecomp.language.generation import DecoderSession


@dataclass(frozen=True)
class Perplexity:
    """`value`: exp of the mean negative log likelihood over `tokens` tokens, by `window` and `stride`."""

    value: float
    tokens: int
    window: int
    stride: int


def perplexity(
    session: DecoderSession, ids: np.ndarray, *, window: int, stride: int | None = None
) -> Perplexity:
    """The perplexity of the text `ids` [n] int64. `stride` None: the window, without overlap.

    Raises DataError for a text shorter than the window, InputError for a window that does not fit the cache
    or a stride that is not 1 to the window, ModelError for NaN logits.
    """
    stride = window if stride is None else stride
    if not 2 <= window <= session.room:
        raise InputError(f"window is {window}; expected 2 to the {session.room} tokens that the cache holds")
    if not 1 <= stride <= window:
        raise InputError(f"stride is {stride}; expected 1 to the window of {window}")
    if len(ids) < window:
        raise DataError(
            f"the text has {len(ids)} tokens, the window {window}; give more text, or a shorter window"
        )
    total, tokens = 0.0, 0
    for start, counted in _windows(len(ids), window, stride):
        part = ids[start : start + window]
        session.reset()
        scores = session.step(part)[-counted - 1 : -1].astype(np.float64)
        if not np.isfinite(scores).all():
            raise ModelError(
                f"the logits of the tokens from {start} on hold NaN or Inf; export the decoder again"
            )
        top = scores.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(scores - top).sum(axis=1)) + top[:, 0]
        total += float((log_sum - scores[np.arange(counted), part[-counted:]]).sum())
        tokens += counted
    return Perplexity(float(np.exp(total / tokens)), tokens, window, stride)


def _windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int]]:
    """Where each whole window begins, and how many of its last tokens count."""
    for start in range(0, length - window + 1, stride):
        yield start, window - 1 if start == 0 or stride == window else stride
