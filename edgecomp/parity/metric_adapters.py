"""Metrics of others: a torchmetrics metric, or any object with `states` and `value`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from edgecomp.errors import InputError
from edgecomp.parity.metric import Metric


class FromTorchmetrics:
    """A torchmetrics metric as `edgecomp.parity.metric.Metric`: it takes the first output and the targets.

    Its `reset`, `update(outputs, targets)` and `compute` are called. Samples are kept: torchmetrics sums its
    states, and slices and intervals need them apart. `higher_is_better` None: the metric says it itself.
    """

    binary = False

    def __init__(self, metric: Any, *, higher_is_better: bool | None = None) -> None:
        told = getattr(metric, "higher_is_better", None) if higher_is_better is None else higher_is_better
        if told is None:
            raise InputError(
                f"{type(metric).__name__} does not say whether higher is better; wrap it in FromTorchmetrics "
                "with higher_is_better=True or False"
            )
        self.name = type(metric).__name__.lower()
        self.higher_is_better = bool(told)
        self._metric = metric

    def states(self, outputs: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
        kept = np.empty(len(targets), dtype=object)
        for i, target in enumerate(targets):
            kept[i] = (np.asarray(outputs[0][i]), np.asarray(target))
        return kept

    def value(self, states: np.ndarray) -> float:
        """Raises InputError when the metric refuses the outputs or targets, or gives more than one number."""
        self._metric.reset()
        outputs, targets = (torch.from_numpy(np.stack([s[i] for s in states])) for i in (0, 1))
        try:
            self._metric.update(outputs, targets)
            result = self._metric.compute()
            return float(result)
        except (ValueError, RuntimeError, TypeError) as error:
            raise InputError(
                f"metric {self.name} does not take outputs {tuple(outputs.shape)} and targets "
                f"{tuple(targets.shape)}, or gives no single number: {error}"
            ) from error


def adapted(found: Any, name: str) -> Metric:
    """What a user's callable returned, as a metric. Raises InputError when it is none."""
    if all(hasattr(found, key) for key in ("states", "value", "name", "higher_is_better", "binary")):
        metric: Metric = found
        return metric
    if all(callable(getattr(found, key, None)) for key in ("update", "compute", "reset")):
        return FromTorchmetrics(found)
    raise InputError(
        f"--metric {name} gives a {type(found).__name__}; expected a torchmetrics metric, or an object with "
        "name, higher_is_better, binary, states and value"
    )
