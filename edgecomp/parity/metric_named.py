"""Metrics by name: built in, or a callable of the user that makes one."""

from __future__ import annotations

from collections.abc import Callable

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
