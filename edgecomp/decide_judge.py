"""How much a quantized candidate lost against the float model, on data held for judging."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgecomp import pipeline_steps as stepping
from edgecomp.errors import DataError
from edgecomp.numerics import metrics
from edgecomp.parity.metric import Metric, infer
from edgecomp.spec import Batch, Candidate, Data, DataSource, Preprocessing

_BATCH = 64
_NOISE = "noise power over output power"
_LEAST = 8
"""Fewer calibration samples than this are not shared between calibration and judging."""


@dataclass(frozen=True)
class Quality:
    """`drop`: points lost (see `Judge.unit`). `agreement`: share of equal top-1, None without classes.
    `metric`: the task's metric, None without targets."""

    sqnr_db: float
    agreement: float | None
    metric: float | None
    drop: float


@dataclass(frozen=True)
class Part:
    """A range of a data source's samples."""

    source: DataSource
    start: int
    stop: int

    @property
    def labels(self) -> tuple[str, ...]:
        return self.source.labels

    @property
    def preprocessing(self) -> Preprocessing | None:
        return self.source.preprocessing

    def __len__(self) -> int:
        return self.stop - self.start

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        """In the source's order, or all of the part's samples in one shuffled order of batches."""
        place = 0
        found: list[Batch] = []
        for batch in self.source.batches(size):
            first, last = max(self.start - place, 0), min(self.stop - place, len(batch))
            place += len(batch)
            if first < last:
                rows = batch.rows[first:last] if batch.rows else ()
                targets = None if batch.targets is None else batch.targets[first:last]
                part = Batch(tuple(a[first:last] for a in batch.inputs), targets, rows)
                if shuffle_seed is None:
                    yield part
                else:
                    found.append(part)
            if place >= self.stop:
                break
        if shuffle_seed is not None:
            for index in np.random.default_rng(shuffle_seed).permutation(len(found)):
                yield found[index]


@dataclass(frozen=True)
class Judge:
    """`unit`: what a drop is in hundredths of. `said`: which data judge. `reference`: float outputs."""

    source: DataSource
    reference: tuple[np.ndarray, ...]
    targets: np.ndarray | None
    metric: Metric | None
    value: float | None
    unit: str
    said: str

    @property
    def of_noise(self) -> bool:
        """Is a drop the power of the outputs' noise itself?"""
        return self.unit == _NOISE

    @property
    def count(self) -> int:
        return len(self.reference[0])

    @classmethod
    def prepare(
        cls, candidate: Candidate, data: Data, most: int, *, of_noise: bool = False
    ) -> tuple[Judge, Data]:
        """A judge, and the data that are left for calibration. `of_noise`: the outputs' noise is judged,
        whatever targets or classes there are. Raises DataError when too few are left."""
        source, said, data = _held_out(data, most)
        runner = stepping.runner(replace(candidate, quantization=None), source)
        outputs, targets = _outputs(runner, source)
        if of_noise:
            return cls(source, outputs, None, None, None, _NOISE, said), data
        metric = None if targets is None else infer(outputs, targets)
        if metric is not None and targets is not None and metric.higher_is_better:
            value = metric.value(metric.states(outputs, targets))
            return cls(source, outputs, targets, metric, value, metric.name, said), data
        unit = "top-1 disagreement" if _has_classes(outputs[0]) else _NOISE
        return cls(source, outputs, None, None, None, unit, said), data

    def quality(self, candidate: Candidate) -> Quality:
        """Raises ModelError when the candidate fails on the data."""
        outputs, _ = _outputs(stepping.runner(candidate, self.source), self.source)
        sqnr = metrics.sqnr_db(_flat(self.reference), _flat(outputs))
        classes = _has_classes(self.reference[0])
        agreement = metrics.top1_agreement(self.reference[0], outputs[0]) if classes else None
        if self.metric is not None and self.targets is not None and self.value is not None:
            value = self.metric.value(self.metric.states(outputs, self.targets))
            return Quality(sqnr, agreement, value, 100 * (self.value - value))
        if agreement is not None and not self.of_noise:
            return Quality(sqnr, agreement, None, 100 * (1 - agreement))
        return Quality(sqnr, agreement, None, 100 * 10 ** (-sqnr / 10))


def _held_out(data: Data, most: int) -> tuple[DataSource, str, Data]:
    if data.evaluation is not None:
        count = min(most, len(data.evaluation))
        return Part(data.evaluation, 0, count), "evaluation data", data
    source = data.calibration or data.train
    count = 0 if source is None else len(source)
    if source is None or count < _LEAST:
        raise DataError(
            f"there are no evaluation data and only {count} calibration samples; give --data SRC to judge "
            f"on, or {_LEAST} calibration samples or more"
        )
    start = count - max(count // 4, 1)
    rest = Part(source, 0, start)
    train = rest if data.calibration is None else data.train
    part = Part(source, start, min(count, start + most))
    return part, "the last quarter of the calibration data", replace(data, calibration=rest, train=train)


def _outputs(runner: object, source: DataSource) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    found: list[Sequence[np.ndarray]] = []
    targets: list[np.ndarray] = []
    for batch in source.batches(_BATCH):
        found.append(runner(batch.inputs))  # type: ignore[operator]
        if batch.targets is not None:
            targets.append(batch.targets)
    outputs = tuple(np.concatenate(parts) for parts in zip(*found, strict=True))
    return outputs, np.concatenate(targets) if len(targets) == len(found) else None


def _flat(outputs: Sequence[np.ndarray]) -> np.ndarray:
    floats = [o.reshape(-1).astype(np.float64) for o in outputs if np.issubdtype(o.dtype, np.floating)]
    return np.concatenate(floats)


def _has_classes(output: np.ndarray) -> bool:
    return output.ndim == 2 and output.shape[1] > 1
