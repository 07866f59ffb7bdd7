"""Where the loss is: the metric for each class and each value of a metadata column, float beside artifact.

A gate looks at `worst_slice.delta` (the largest drop), at `worst_slice.delta.high` (certain: some slice
lost at least this much, with 95 % confidence over all slices together), or at `gaps.COLUMN.change` (by how
much the spread between the best and the worst group grew).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from edgecomp.errors import DataError, UnknownNameError
from edgecomp.numerics import metrics
from edgecomp.parity import metric as tasks
from edgecomp.parity.observe import Observations

CLASS = "class"
# Smaller slices are listed, but neither called the worst nor counted in a gap.
MIN_SAMPLES = 20


def slice_figures(
    seen: Observations, name: str, columns: Sequence[str], labels: Sequence[str]
) -> dict[str, Any]:
    """`slices[]`, `worst_slice` and `gaps` of one session; empty without targets.

    `columns`: metadata columns, or `class` for the target. Raises UnknownNameError for a column that no
    sample has, DataError when some samples lack it.
    """
    measured = seen.measured(name)
    groups = [(c, v, rows) for c in columns for v, rows in members(seen, c, labels)]
    if measured is None or not groups:
        return {"slices": [], "worst_slice": None, "gaps": {}}
    metric, reference, test = measured
    level = 1 - 0.05 / len(groups)
    slices = [
        {"column": c, "value": v, **figures(metric, reference[rows], test[rows], level)}
        for c, v, rows in groups
    ]
    return {
        "slices": slices,
        "worst_slice": worst(slices, metric),
        "gaps": {c: gap([s for s in slices if s["column"] == c], metric) for c in columns},
    }


def members(seen: Observations, column: str, labels: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Each value of a column, and the sample numbers that have it."""
    if column == CLASS:
        targets = seen.targets
        if targets is None or targets.ndim != 1 or targets.dtype.kind not in "iu":
            return
        for c in np.unique(targets):
            name = labels[c] if c < len(labels) else str(c)
            yield name, np.flatnonzero(targets == c)
        return
    values = [row.get(column) for row in seen.rows]
    missing = sum(v is None for v in values)
    if missing == len(values):
        known = {key for row in seen.rows for key in row} - {"path"} | {CLASS}
        raise UnknownNameError("slice column", column, known)
    if missing:
        raise DataError(f"{missing} of {len(values)} samples have no {column!r}; give every sample a value")
    names = np.array([str(v) for v in values])
    for name in np.unique(names):
        yield str(name), np.flatnonzero(names == name)


def figures(
    metric: tasks.Metric, reference: np.ndarray, test: np.ndarray, family_level: float
) -> dict[str, Any]:
    """Metric of both sides over some rows. `family95`: the interval at the level shared by all slices."""
    values = metric.value(reference), metric.value(test)
    return {
        "samples": len(reference),
        "reference": values[0],
        "artifact": values[1],
        "delta": values[1] - values[0],
        "ci95": list(tasks.difference_interval(metric, reference, test)),
        "family95": list(family_interval(metric, reference, test, family_level)),
    }


def family_interval(
    metric: tasks.Metric, reference: np.ndarray, test: np.ndarray, level: float
) -> tuple[float, float]:
    """Interval at Bonferroni's level 1 - 0.05 / slices: all of them hold together with 95 %."""
    if metric.binary:
        gained = int(np.sum((test > 0.5) & (reference < 0.5)))
        lost = int(np.sum((test < 0.5) & (reference > 0.5)))
        z = NormalDist().inv_cdf(0.5 + level / 2)
        return metrics.paired_difference_interval(gained, lost, len(test), z=z)
    return metrics.bootstrap_interval(
        lambda rows: metric.value(test[rows]) - metric.value(reference[rows]), len(test), level=level
    )


def counted(slices: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [s for s in slices if s["samples"] >= MIN_SAMPLES]


def worst(slices: Sequence[dict[str, Any]], metric: tasks.Metric) -> dict[str, Any] | None:
    """The slice that lost most. For errors, where lower is better, the one whose error grew most."""
    large = counted(slices)
    if not large:
        return None
    sign = 1 if metric.higher_is_better else -1
    return min(large, key=lambda s: sign * s["delta"])


def family_ends(slices: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """Lowest lower and lowest upper end over all slices (of a metric where higher is better)."""
    large = counted(slices)
    if not large:
        return None
    return min(s["family95"][0] for s in large), min(s["family95"][1] for s in large)


def gap(slices: Sequence[dict[str, Any]], metric: tasks.Metric) -> dict[str, float] | None:
    """Best minus worst group, for the float model and the artifact; `change`: how much it grew."""
    large = counted(slices)
    if len(large) < 2:
        return None
    spread = [max(s[w] for s in large) - min(s[w] for s in large) for w in ("reference", "artifact")]
    return {"reference": spread[0], "artifact": spread[1], "change": spread[1] - spread[0]}
