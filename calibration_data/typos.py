"""Typing errors in texts at five severities.

What fingers do to a QWERTY keyboard: a neighbouring key, a letter left out, doubled, or exchanged with the
next one. The kinds are those of Pruthi, Dhingra and Lipton, Combating Adversarial Misspellings with Robust
Word Recognition (2019), sec. 3 (swap, drop, keyboard, add); here they fall at random, not on the worst place.
"""

from __future__ import annotations

import numpy as np

from edgecomp.errors import DataError
from edgecomp.spec import Preprocessing

# Share of letters that are hit at severity 1 to 5: from a careful typist to a phone on a bus.
SHARES = (0.01, 0.02, 0.04, 0.07, 0.10)
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbours() -> dict[str, str]:
    """Each letter's keys to the left and right, above and below (rows are offset by half a key)."""
    found = {}
    for r, row in enumerate(_ROWS):
        for c, letter in enumerate(row):
            near = [row[i] for i in (c - 1, c + 1) if 0 <= i < len(row)]
            for other, shift in ((r - 1, (0, 1)), (r + 1, (-1, 0))):
                if 0 <= other < len(_ROWS):
                    near += [_ROWS[other][c + s] for s in shift if 0 <= c + s < len(_ROWS[other])]
            found[letter] = "".join(near)
    return found


NEIGHBOURS = _neighbours()


def typos(text: str, severity: int, rng: np.random.Generator) -> str:
    """The text with a share of its letters mistyped; digits, spaces and punctuation stay.

    Raises DataError for a severity that is not 1 to 5.
    """
    if not 1 <= severity <= len(SHARES):
        raise DataError(f"severity is {severity}; expected 1 to 5")
    letters = list(text)
    at = 0
    while at < len(letters):
        if letters[at].isalpha() and rng.random() < SHARES[severity - 1]:
            at += _mistype(letters, at, int(rng.integers(0, 4)), rng)
        at += 1
    return "".join(letters)


def _mistype(letters: list[str], at: int, kind: int, rng: np.random.Generator) -> int:
    """One error in place; returns how many letters more are to be passed over."""
    letter = letters[at]
    near = NEIGHBOURS.get(letter.lower(), "")
    if kind == 0 and near:
        key = near[int(rng.integers(0, len(near)))]
        letters[at] = key.upper() if letter.isupper() else key
        return 0
    if kind == 1:
        letters[at] = ""
        return 0
    if kind == 2 and at + 1 < len(letters) and letters[at + 1].isalpha():
        letters[at], letters[at + 1] = letters[at + 1], letter
        return 1
    letters[at] = letter * 2
    return 0


class TextCorruptions:
    """Typing errors of samples that carry their text: rows with `text`, and a source that can encode one."""

    names = ("typos",)
    of_text = True

    @classmethod
    def accepts(cls, sample: np.ndarray, how: Preprocessing | None) -> bool:
        return how is None and sample.ndim == 1 and sample.dtype.kind in "iu"

    def change(self, text: str, severity: int, rng: np.random.Generator) -> str:
        return typos(text, severity, rng)
