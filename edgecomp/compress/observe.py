"""Observers: the range of every value of a graph over calibration data, in bounded memory.

Two passes at most: the first finds smallest and largest values, the second (for observers that look at the
distribution) counts a histogram between them. Nothing else is kept, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgecomp.errors import DataError, InputError
from edgecomp.graph.interpret import watch
from edgecomp.numerics import ranges
from edgecomp.numerics.extremes import Extremes
from edgecomp.spec import DataSource, QuantSpec

Observer = Literal["minmax", "moving-average", "percentile", "entropy", "mse", "output"]

SENTINEL = 1e30
"""Beyond this magnitude a value is a mark, not a number: -inf and finfo.min of attention masks."""
SENTINEL_MARGIN = 16.0
"""A marked value is stored this far below the largest real one: exp(-16) is 0 in any 8-bit softmax."""

_BINS = 2048
_MOMENTUM = 0.1
_ONE_IN = 300

Batches = Callable[[], Iterable[Sequence[Tensor]]]


@dataclass
class Extent:
    """Smallest and largest value seen, sentinels left out; `marked` when there were some."""

    low: float = np.inf
    high: float = -np.inf
    marked: bool = False
    lows: Extremes = field(default_factory=Extremes)
    highs: Extremes = field(default_factory=Extremes)

    def widen(self, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.lows.add(-low)
        self.highs.add(high)

    def follow(self, low: float, high: float) -> None:
        """Moving average of per-batch extremes, momentum 0.1 (TensorFlow's and PyTorch's default is 0.01)."""
        if self.low > self.high:
            self.low, self.high = low, high
        self.low += _MOMENTUM * (low - self.low)
        self.high += _MOMENTUM * (high - self.high)

    def final(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.low > self.high else self.with_margin(self.low, self.high)

    def roomy(self) -> tuple[float, float]:
        """The range with room for samples that were not seen: one in 300 is expected to go beyond."""
        if self.low > self.high or self.marked:
            return self.final()
        return min(self.low, -self.lows.level(_ONE_IN)), max(self.high, self.highs.level(_ONE_IN))

    def with_margin(self, low: float, high: float) -> tuple[float, float]:
        """The range with room for a mark below it, however an observer shrank it."""
        return (min(low, high - SENTINEL_MARGIN) if self.marked else low), high


@dataclass(frozen=True)
class ObserverSettings:
    """`percentile`: how much of the values the range keeps, in percent (observer "percentile")."""

    observer: Observer = "minmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.observer not in get_args(Observer):
            raise InputError(
                f"observer is {self.observer!r}; expected one of {', '.join(get_args(Observer))}"
            )
        if not 50.0 < self.percentile <= 100.0:
            raise InputError(f"percentile is {self.percentile}; expected more than 50 and at most 100")


def tensor_batches(source: DataSource, samples: int, size: int = 1) -> Iterator[tuple[Tensor, ...]]:
    """The first `samples` samples of a source as tensors, `size` at a time (the last may be smaller)."""
    left = min(samples, len(source))
    for batch in source.batches(size):
        take = min(left, len(batch))
        yield tuple(torch.from_numpy(np.ascontiguousarray(a[:take])) for a in batch.inputs)
        left -= take
        if left <= 0:
            return


def observe(
    graph_module: GraphModule,
    batches: Batches,
    names: Sequence[str],
    spec: QuantSpec,
    settings: ObserverSettings,
    roomy: frozenset[str] = frozenset(),
) -> dict[str, tuple[float, float]]:
    """Range (low, high) of each named node over all batches. Raises DataError on NaN.

    `roomy`: nodes whose extremes get room for unseen samples (observer "minmax"). "output" is no observer of
    single values: `widest_and_clipped` gives what it chooses from.
    """
    if settings.observer in ("minmax", "moving-average"):
        extents = _extents(graph_module, batches, frozenset(names), settings.observer == "moving-average")
        return _final(extents, roomy if settings.observer == "minmax" else frozenset())
    return widest_and_clipped(graph_module, batches, names, spec, settings)[1]


def _final(extents: Mapping[str, Extent], roomy: frozenset[str]) -> dict[str, tuple[float, float]]:
    return {name: e.roomy() if name in roomy else e.final() for name, e in extents.items()}


def widest_and_clipped(
    graph_module: GraphModule,
    batches: Batches,
    names: Sequence[str],
    spec: QuantSpec,
    settings: ObserverSettings,
    roomy: frozenset[str] = frozenset(),
) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """Extremes of each named node (with room for `roomy`), and the range that an observer of distributions
    chose."""
    extents = _extents(graph_module, batches, frozenset(names), follow=False)
    found = _final(extents, roomy)
    counts = _histograms(graph_module, batches, found)
    chosen = {name: _choose(counts[name], *found[name], spec, settings) for name in found}
    return found, {name: extents[name].with_margin(*chosen[name]) for name in found}


def _choose(
    counts: np.ndarray, low: float, high: float, spec: QuantSpec, settings: ObserverSettings
) -> tuple[float, float]:
    if low == high or not counts.any():
        return low, high
    if settings.observer == "percentile":
        return ranges.percentile(counts, low, high, settings.percentile)
    if settings.observer == "entropy":
        return ranges.entropy(counts, low, high, spec)
    return ranges.least_squares(counts, low, high, spec)


def _extents(
    graph_module: GraphModule, batches: Batches, wanted: frozenset[str], follow: bool
) -> dict[str, Extent]:
    extents = {name: Extent() for name in wanted}

    def visit(node: Node, value: Tensor) -> None:
        low, high = (float(v) for v in torch.aminmax(value))
        extent = extents[node.name]
        if not -SENTINEL < low <= high < SENTINEL:
            low, high = _real_extremes(node, value)
            extent.marked = True
            if low > high:
                return
        (extent.follow if follow else extent.widen)(low, high)

    for inputs in batches():
        watch(graph_module, inputs, visit, wanted)
    return extents


def _real_extremes(node: Node, value: Tensor) -> tuple[float, float]:
    if bool(torch.isnan(value).any()):
        module = node.meta.get("module") or node.name
        raise DataError(
            f"calibration gave NaN at {module!r} ({node.name}); look for NaN in the data or a division by 0"
        )
    real = value[value.abs() < SENTINEL]
    return (float(real.min()), float(real.max())) if real.numel() else (np.inf, -np.inf)


def _histograms(
    graph_module: GraphModule, batches: Batches, found: dict[str, tuple[float, float]]
) -> dict[str, np.ndarray]:
    totals = {name: torch.zeros(_BINS, dtype=torch.float64) for name in found}

    def visit(node: Node, value: Tensor) -> None:
        low, high = found[node.name]
        if low < high:
            totals[node.name] += torch.histc(value.float(), _BINS, low, high).double()

    for inputs in batches():
        watch(graph_module, inputs, visit, frozenset(found))
    return {name: counts.numpy() for name, counts in totals.items()}
