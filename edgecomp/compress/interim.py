"""What a trained step keeps on disk while it trains, so that a kill costs a minute and not the step.

The chain opens a folder for a step with `within`. Each call of `fit` inside it is numbered and writes
`fit-N.pt` there: weights, optimizer, schedule, random state, place in the data, and the state of whatever
was attached. A step that is run again from its start finds finished trainings done and the last one where it
was; all between them is computed again, from the same numbers. Without an open folder nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from edgecomp import files, progress
from edgecomp.compress import parallel

SECONDS = 60.0
# Writing takes at most about this share of the time.
_SHARE = 0.05


class Stateful(Protocol):
    """A module, an optimizer, a schedule, or anything of ours that goes on where it was."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


@dataclass
class Progress:
    """Where a training is: the next epoch (from 1), batches of it that are done, and the best one so far."""

    epoch: int = 1
    batches: int = 0
    total: float = 0.0
    count: int = 0
    best: tuple[float, float] | None = None
    best_epoch: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def next_epoch(self) -> None:
        self.epoch, self.batches, self.total, self.count = self.epoch + 1, 0, 0.0, 0


class _Folder:
    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds, self.count = path, seconds, 0
        self.attached: dict[str, Stateful] = {}


_OPEN: ContextVar[_Folder | None] = ContextVar("interim", default=None)


@contextmanager
def within(path: Path, seconds: float = SECONDS) -> Iterator[None]:
    """Trainings inside keep their state in this folder, about every `seconds`, and go on from it."""
    token = _OPEN.set(_Folder(path, seconds))
    try:
        yield
    finally:
        _OPEN.reset(token)


def attach(name: str, thing: Stateful) -> None:
    """The next training keeps this too: what a loss or a hook remembers from one batch to the next."""
    if (folder := _OPEN.get()) is not None:
        folder.attached[name] = thing


def folder_for(name: str) -> Path | None:
    """A folder for files that must outlive a kill, for the next training; None where nothing is kept."""
    folder = _OPEN.get()
    return None if folder is None else folder.path / f"{name}-{folder.count + 1}"


class Keeper:
    """Writes and reads the state of one training. `parts`: what makes up that state, by name."""

    def __init__(self, parts: Mapping[str, Stateful | None]) -> None:
        self._parts = {n: p for n, p in parts.items() if p is not None}
        self._path: Path | None = None
        self._every, self._last = SECONDS, time.monotonic()
        folder = _OPEN.get()
        if folder is not None:
            folder.count += 1
            self._path, self._every = folder.path / f"fit-{folder.count}.pt", folder.seconds
            self._parts |= {f"attached {n}": p for n, p in folder.attached.items()}
            folder.attached = {}

    def restore(self) -> tuple[Progress, tuple[str, ...] | None]:
        """The place to go on from, everything loaded; and the notes of a training that is done already."""
        parallel.wait()
        if self._path is None or not self._path.is_file():
            return Progress(), None
        facts = torch.load(self._path, weights_only=True)
        for name, part in self._parts.items():
            part.load_state_dict(facts["parts"][name])
        torch.set_rng_state(facts["random"][parallel.rank()])
        told = facts["progress"]
        best = None if told["best"] is None else tuple(told["best"])
        notes = None if facts["notes"] is None else tuple(facts["notes"])
        if notes is None:
            progress.note(f"going on in epoch {told['epoch']}, after {told['batches']} batches")
        return Progress(**{**told, "best": best}), notes

    def keep(self, place: Progress) -> None:
        """Write, when enough time has passed since the last time."""
        if self._path is not None and parallel.first_says(time.monotonic() - self._last >= self._every):
            started = time.monotonic()
            self._write(place, None)
            self._last = time.monotonic()
            self._every = max(self._every, (self._last - started) / _SHARE)

    def done(self, notes: tuple[str, ...]) -> None:
        """The training is over: what remains is the weights that it chose, and what it says of itself."""
        if self._path is not None:
            self._write(Progress(), notes)

    def _write(self, place: Progress, notes: tuple[str, ...] | None) -> None:
        random = parallel.gathered(torch.get_rng_state())
        if parallel.rank() == 0 and self._path is not None:
            facts = {
                "parts": {n: p.state_dict() for n, p in self._parts.items()},
                "random": random,
                "progress": {**asdict(place)},
                "notes": None if notes is None else list(notes),
            }
            with files.atomic(self._path) as temporary:
                torch.save(facts, temporary)
