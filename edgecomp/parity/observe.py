"""Run the float model and one or more sessions of an artifact over the data, once, batch by batch.

What is kept for each sample is a few numbers; outputs are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from edgecomp import door
from edgecomp.errors import ArtifactError, DataError
from edgecomp.numerics import metrics
from edgecomp.parity import metric as tasks
from edgecomp.parity.distribution import DistributionTally
from edgecomp.spec import Batch, DataSource, Session

# The float model: a tuple of arrays [N, ...] in, its outputs [N, ...] out.
Reference = Callable[[tuple[np.ndarray, ...]], Sequence[np.ndarray]]


@dataclass
class OutputTally:
    """Energies of one output, summed over all samples."""

    name: str
    signal: float = 0.0
    noise: float = 0.0
    cosines: float = 0.0
    max_abs_error: float = 0.0
    samples: int = 0

    def add(self, reference: np.ndarray, test: np.ndarray) -> None:
        r, t = reference.astype(np.float64), test.astype(np.float64)
        self.signal += float(np.sum(r * r))
        self.noise += float(np.sum((r - t) ** 2))
        self.cosines += float(np.sum(metrics.cosines(r, t)))
        self.max_abs_error = max(self.max_abs_error, metrics.max_abs_error(r, t))
        self.samples += len(r)

    @property
    def sqnr_db(self) -> float:
        return metrics.ratio_db(self.signal, self.noise)

    @property
    def cosine(self) -> float:
        return self.cosines / self.samples


@dataclass
class Side:
    """What is kept of one model's outputs: class, confidence, true class' probability, metric states."""

    predicted: list[np.ndarray] = field(default_factory=list)
    confidence: list[np.ndarray] = field(default_factory=list)
    squared: list[np.ndarray] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)

    def add(
        self, outputs: Sequence[np.ndarray], targets: np.ndarray | None, metric: tasks.Metric | None
    ) -> None:
        scores = outputs[0]
        if is_scores(scores):
            probability = metrics.probabilities(scores)
            self.predicted.append(scores.argmax(axis=1))
            self.confidence.append(probability.max(axis=1))
            if targets is not None and is_classes(targets, scores):
                picked = probability[np.arange(len(scores)), targets]
                self.squared.append(np.sum(probability**2, axis=1) - 2 * picked + 1)
        if metric is not None and targets is not None:
            self.states.append(metric.states(outputs, targets))

    def joined(self, name: str) -> np.ndarray | None:
        parts = getattr(self, name)
        return np.concatenate(parts) if parts else None


def is_scores(array: np.ndarray) -> bool:
    """[N, classes] with at least two classes."""
    return array.ndim == 2 and array.shape[1] > 1


def is_classes(targets: np.ndarray, scores: np.ndarray) -> bool:
    return targets.dtype.kind in "iu" and targets.ndim == 1 and int(targets.max()) < scores.shape[1]


@dataclass
class Observations:
    """Everything that one pass over the data left: the reference's side, and one for each session."""

    metric: tasks.Metric | None
    samples: int
    reference: Side
    tests: dict[str, Side]
    outputs: dict[str, list[OutputTally]]
    between: dict[str, OutputTally]
    distributions: dict[str, DistributionTally]
    targets: np.ndarray | None
    rows: list[Mapping[str, Any]]

    def measured(self, name: str) -> tuple[tasks.Metric, np.ndarray, np.ndarray] | None:
        """The metric and its states of the float model and of one session; None without a metric."""
        states = self.reference.joined("states"), self.tests[name].joined("states")
        if self.metric is None or states[0] is None or states[1] is None:
            return None
        return self.metric, states[0], states[1]


def observe(
    reference: Reference,
    sessions: Mapping[str, Session | Reference],
    source: DataSource,
    *,
    metric: tasks.Metric | None = None,
    batch_size: int = 32,
    limit: int | None = None,
) -> Observations:
    """One pass over the data. `sessions`: opened artifacts, or callables like the reference.

    `metric` None: the one that fits the shapes, where there are targets.

    `between`: of each session but the first, its first output against the first session's.
    Raises DataError for data that does not fit, ArtifactError when outputs are not the model's.
    """
    sides, tests = Side(), {name: Side() for name in sessions}
    tallies: dict[str, list[OutputTally]] = {}
    between: dict[str, OutputTally] = {}
    distributions = {name: DistributionTally() for name in sessions}
    targets: list[np.ndarray] = []
    rows: list[Mapping[str, Any]] = []
    samples = 0
    for batch in limited(source, batch_size, limit):
        expected = [np.asarray(o) for o in reference(batch.inputs)]
        if samples == 0 and metric is None:
            metric = tasks.infer(expected, batch.targets)
        sides.add(expected, batch.targets, metric)
        first: Sequence[np.ndarray] | None = None
        for name, session in sessions.items():
            found = run(session, batch.inputs)
            check_outputs(expected, found, session)
            tests[name].add(found, batch.targets, metric)
            tally = tallies.setdefault(name, [OutputTally(n) for n in output_names(session, len(found))])
            for t, r, f in zip(tally, expected, found, strict=True):
                t.add(r, f)
            distributions[name].add(expected[0], found[0], batch.targets)
            if first is None:
                first = found
            else:
                between.setdefault(name, OutputTally(name)).add(first[0], found[0])
        samples += len(batch)
        rows += batch.rows or [{}] * len(batch)
        if batch.targets is not None:
            targets.append(batch.targets)
    if samples == 0:
        raise DataError("the data source gave no sample; parity needs at least one")
    joined = np.concatenate(targets) if targets else None
    return Observations(metric, samples, sides, tests, tallies, between, distributions, joined, rows)


def limited(source: DataSource, batch_size: int, limit: int | None) -> Iterator[Batch]:
    """Batches of the source, the first `limit` samples of it when a limit is given."""
    if limit is None:
        yield from source.batches(batch_size)
        return
    for batch in islice(source.batches(batch_size), -(-limit // batch_size)):
        keep = min(len(batch), limit)
        limit -= keep
        targets = None if batch.targets is None else batch.targets[:keep]
        yield Batch(tuple(a[:keep] for a in batch.inputs), targets, batch.rows[:keep])


def run(session: Session | Reference, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Any number of samples through an artifact of fixed batch size: the last slice is filled up."""
    if callable(session):
        return [np.asarray(o) for o in session(tuple(inputs))]
    if len(inputs) != len(session.inputs):
        raise DataError(
            f"the data gives {len(inputs)} inputs a sample, the artifact takes {len(session.inputs)} "
            f"({', '.join(s.name for s in session.inputs)}): correct the data source"
        )
    size, count = session.inputs[0].shape[0], len(inputs[0])
    missing = -count % size
    if missing:
        inputs = [np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]) for a in inputs]
    return [o[:count] for o in door.run_float(session, inputs)]


def output_names(session: Session | Reference, count: int) -> list[str]:
    """The session's own names; a callable's outputs are numbered."""
    if callable(session):
        return [f"output_{i}" for i in range(count)]
    return [s.name for s in session.outputs]


def check_outputs(
    expected: Sequence[np.ndarray], found: Sequence[np.ndarray], session: Session | Reference
) -> None:
    """Raise ArtifactError when number or shape of the outputs are not the float model's."""
    if [e.shape for e in expected] != [f.shape for f in found]:
        raise ArtifactError(
            f"the artifact gives outputs of shape {[f.shape for f in found]} "
            f"({', '.join(output_names(session, len(found)))}), the float model "
            f"{[e.shape for e in expected]}; "
            "they are not the same model: give the model that the artifact was made from"
        )
