"""Progress on stderr: bars on a terminal, one plain line per milestone in a pipe or with NO_COLOR."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def interactive() -> bool:
    """True when bars may be drawn: stderr is a terminal and NO_COLOR is not set."""
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ


def bar(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate `items` behind a progress bar on stderr; silent when stderr is not a terminal."""
    return iter(tqdm(items, desc=label, total=total, leave=False, disable=not interactive(), file=sys.stderr))


def note(text: str) -> None:
    """One line of progress on stderr, above any bar that is drawn."""
    tqdm.write(text, file=sys.stderr)
