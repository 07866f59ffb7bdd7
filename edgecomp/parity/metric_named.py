"""Metrics by name: built in, or a callable of the user that makes one."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from edgecomp.errors import InputError, UnknownNameError
from edgecomp.parity.metric import Accuracy, Metric, RootMeanSquare
from edgecomp.parity.metric_adapters import adapted
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
    """The metric of that name, or what `file.py:callable` or `package.module:callable` returns.

    Raises UnknownNameError with the nearest name, InputError for a callable that gives no metric.
    """
    place, colon, attribute = name.rpartition(":")
    if colon:
        return _from_user(place, attribute, name)
    if name not in NAMED:
        raise UnknownNameError("metric", name, NAMED)
    return NAMED[name]()


def _from_user(place: str, attribute: str, name: str) -> Metric:
    try:
        module = _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        found = getattr(module, attribute)()
    except Exception as error:  # the user's code may raise anything
        raise InputError(f"metric {name!r} cannot be made: {type(error).__name__}: {error}") from error
    return adapted(found, name)


def _file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"edgecomp_metric_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no Python file at {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
