"""Metrics by name: built in, or a callable of the user that makes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgecomp.errors import UnknownNameError
from edgecomp.parity.metric import Accuracy, Metric, RootMeanSquare
from edgecomp.parity.metric_more import AveragePrecision, MeanIoU, Perplexity, RankCorrelation, RecallAtK

NAMED: dict[str, Callable[[], Metric]] = {
    "accuracy": Accuracy,
    "top5_accuracy": lambda: Accuracy(5),
    "rmse": RootMeanSquare,
    "miou": MeanIoU,
    "map50": AveragePrecision,
    "map75": lambda: AveragePrecision(0.75),
    "recall_at_1": RecallAtK,
    "recall_at_5": lambda: RecallAtK(5),
    "spearman": RankCorrelation,
    "perplexity": Perplexity,
}


def by_name(name: str) -> Metric:
    """The metric of that name. Raises UnknownNameError with the nearest one."""
    if name not in NAMED:
        raise UnknownNameError("metric", name, NAMED)
    return NAMED[name]()


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
