"""Pruning until a budget holds that only the exported file can tell: latency on a device, or bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from edgecomp import pipeline_export as exporting
from edgecomp import progress, trial
from edgecomp.compress.macs import count_macs
from edgecomp.compress.prune import example_inputs, to_macs
from edgecomp.compress.prune_scores import Criterion
from edgecomp.errors import ModelError, RecipeError
from edgecomp.files import size_bytes
from edgecomp.recipe import ProfileEntry
from edgecomp.spec import Candidate, Data, StepRecord


@dataclass(frozen=True)
class PruneToBudget:
    """Prune, export to `target`, measure, and again, until the file fits `latency_ms` or `size_bytes`.

    Give one of the two. `latency_ms`: median of one inference on `device`, `threads` threads, measured by the
    profiler in a fresh process; each try runs in turns with the unpruned file, whose latency is measured once
    and multiplied by the ratio, so that other work on the device misleads nobody. The search halves the range
    of multiply-accumulates that may remain; it ends when the file is within `tolerance` below the budget, or
    after `attempts`, and keeps the largest model that fits. Training comes after it: latency does not depend
    on the weights' values. The other fields are those of `prune`. Raises ModelError when no model fits,
    DeviceError when the device is lost.
    """

    target: str = "tflite-int8"
    latency_ms: float | None = None
    size_bytes: int | None = None
    device: str = "local"
    threads: int = 1
    tolerance: float = 0.05
    attempts: int = 8
    criterion: Criterion = "l2"
    scope: Literal["group", "global"] = "group"
    round_to: int = 8
    max_sparsity: float = 0.9
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.latency_ms is None) == (self.size_bytes is None):
            raise RecipeError(
                f"prune-to-budget has latency_ms {self.latency_ms} and size_bytes {self.size_bytes}; "
                "expected one of the two"
            )
        if self.budget <= 0 or not 0 < self.tolerance < 1 or self.attempts < 1:
            raise RecipeError("the budget must be positive, tolerance between 0 and 1, attempts 1 or more")

    @property
    def budget(self) -> float:
        return float(self.latency_ms if self.latency_ms is not None else self.size_bytes or 0)

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        total = count_macs(candidate.module, example_inputs(candidate))
        search = _Search(self.budget, self.tolerance)
        with tempfile.TemporaryDirectory(prefix="edgecomp-budget-") as folder:
            measure = self._measure(data, Path(folder))
            chosen = search.tried(1.0, candidate, measure(candidate))
            while not search.done and search.count <= self.attempts:
                share = search.next_share()
                try:
                    chosen = to_macs(self, share * total, recovery="none")(candidate, data)
                except ModelError as error:
                    search.refuse(share, str(error))
                    continue
                search.tried(share, chosen, measure(chosen))
        share, best = search.best()
        if share < 1:  # the same channels go; now what stays is fitted too, which no try needed
            best = to_macs(self, share * total)(candidate, data)
        record = StepRecord("prune-to-budget", "prune", asdict(self), (*search.notes, *_last_notes(best)))
        original = candidate.original if candidate.original is not None else candidate.module
        return replace(best, history=(*candidate.history, record), original=original)

    def _measure(self, data: Data, folder: Path) -> Callable[[Candidate], float]:
        """Candidate -> milliseconds or bytes of its artifact."""
        if self.latency_ms is None:
            return lambda candidate: float(size_bytes(trial.write(candidate, data, self.target, folder)))
        (device,) = exporting.open_devices([self.device])
        entry = ProfileEntry(devices=(self.device,), threads=self.threads)
        first: list[tuple[Path, float]] = []

        def measured(candidate: Candidate) -> float:
            place = folder / ("first" if not first else "tried")
            place.mkdir(exist_ok=True)
            path = trial.write(candidate, data, self.target, place)
            if first:
                before, latency = first[0]
                return latency * trial.ratio(device, before, path, entry)
            found = exporting.profiles(path, [device], entry)[0]["latency_ms"]
            if found is None:
                raise RecipeError(f"latency of {self.target!r} cannot be measured on device {self.device!r}")
            first.append((path, float(found["p50"])))
            return first[0][1]

        return measured


class _Search:
    """Halves the range between a share of multiply-accumulates that fits and one that does not."""

    def __init__(self, budget: float, tolerance: float) -> None:
        self.budget, self.tolerance = budget, tolerance
        self.low, self.high = 0.0, 1.0
        self.fitting: tuple[float, Candidate] | None = None
        self.notes: list[str] = []
        self.count = 0
        self.done = False

    def next_share(self) -> float:
        return (self.low + self.high) / 2

    def tried(self, share: float, candidate: Candidate, value: float) -> Candidate:
        self.count += 1
        fits = value <= self.budget
        self._note(f"{share:.3f} of the multiply-accumulates: {value:.6g}, the budget is {self.budget:.6g}")
        if fits and (self.fitting is None or share > self.fitting[0]):
            self.fitting = (share, candidate)
        self.low, self.high = (share, self.high) if fits else (self.low, share)
        self.done = fits and (share == 1.0 or value >= self.budget * (1 - self.tolerance))
        return candidate

    def refuse(self, share: float, reason: str) -> None:
        self.count += 1
        self._note(f"{share:.3f} of the multiply-accumulates: {reason}")
        self.low = share

    def best(self) -> tuple[float, Candidate]:
        if self.fitting is None:
            raise ModelError(
                f"no pruned model fits the budget of {self.budget:.6g}: {self.notes[-1]}; raise the budget, "
                "max_sparsity, or attempts"
            )
        return self.fitting

    def _note(self, text: str) -> None:
        progress.note(text)
        self.notes.append(text)


def _last_notes(candidate: Candidate) -> tuple[str, ...]:
    return candidate.history[-1].notes if candidate.history else ()
