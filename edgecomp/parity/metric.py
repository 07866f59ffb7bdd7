"""Task metrics: what "as good as the float model" means for a kind of model.

A metric reduces each sample to a row of sufficient statistics and computes its value from any set of such
rows. That is all that slices, corruptions and paired intervals need, and outputs are never kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgecomp.numerics import metrics
from edgecomp.parity.metric_check import expect
from edgecomp.parity.metric_more import MeanIoU, Perplexity


class Metric(Protocol):
    """`binary`: each state is one 0 or 1 and the value is their mean (its interval is then exact)."""

    @property
    def name(self) -> str: ...

    @property
    def higher_is_better(self) -> bool: ...

    @property
    def binary(self) -> bool: ...

    def states(self, outputs: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
        """Sufficient statistics [N, K] (or an object array [N]) of a batch of outputs and its targets."""
        ...

    def value(self, states: np.ndarray) -> float:
        """The metric over these rows, in its own unit."""
        ...


@dataclass(frozen=True)
class Accuracy:
    """Share of samples whose target is among the `k` largest scores [N, classes]; ties count as the first."""

    k: int = 1
    higher_is_better: bool = True
    binary: bool = True

    @property
    def name(self) -> str:
        return "accuracy" if self.k == 1 else f"top{self.k}_accuracy"

    def states(self, outputs: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
        scores = outputs[0]
        expect(self.name, scores, "[N, classes]", scores.ndim == 2, targets, "[N]", targets.ndim == 1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.k]
        return (best == targets[:, None]).any(axis=1).astype(np.float64)[:, None]

    def value(self, states: np.ndarray) -> float:
        return float(states.mean())


@dataclass(frozen=True)
class RootMeanSquare:
    """Root of the mean squared error of a regression; outputs and targets have one shape, [N, ...]."""

    name: str = "rmse"
    higher_is_better: bool = False
    binary: bool = False

    def states(self, outputs: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
        values = outputs[0].reshape(len(outputs[0]), -1).astype(np.float64)
        wanted = targets.reshape(len(targets), -1)
        same = values.shape == wanted.shape
        expect(self.name, outputs[0], "[N, ...]", same, targets, "of the same shape", same)
        return np.mean((values - wanted) ** 2, axis=1)[:, None]

    def value(self, states: np.ndarray) -> float:
        return float(np.sqrt(states.mean()))


def infer(outputs: Sequence[np.ndarray], targets: np.ndarray | None) -> Metric | None:
    """The metric that fits the shapes; None without targets, or when none does.

    Class numbers [N]: accuracy; a class for each pixel: mIoU; for each token: perplexity; floats: RMSE.
    """
    if targets is None:
        return None
    scores = outputs[0]
    if targets.dtype.kind in "iu":
        if targets.ndim == 1 and scores.ndim == 2 and scores.shape[1] > 1:
            return Accuracy()
        if scores.ndim == 4 and targets.shape == (scores.shape[0], *scores.shape[2:]):
            return MeanIoU()
        if scores.ndim == 3 and targets.shape == scores.shape[:2]:
            return Perplexity()
    return RootMeanSquare() if scores.size == targets.size else None


def difference_interval(
    metric: Metric, reference: np.ndarray, test: np.ndarray, *, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of value(test) - value(reference) over the same samples.

    Tango's score interval for a binary metric, else a paired bootstrap of the samples.
    """
    if metric.binary:
        gained = int(np.sum((test > 0.5) & (reference < 0.5)))
        lost = int(np.sum((test < 0.5) & (reference > 0.5)))
        return metrics.paired_difference_interval(gained, lost, len(test))
    return metrics.bootstrap_interval(
        lambda rows: metric.value(test[rows]) - metric.value(reference[rows]), len(test), seed=seed
    )
