"""How far activation ranges move from one draw of calibration samples to another, and how many suffice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from edgecomp import progress
from edgecomp.errors import DataError
from edgecomp.graph import capture
from edgecomp.graph.interpret import watch
from edgecomp.spec import DataSource, TensorSpec

# Ranges have settled when the 95th percentile of the deviation over draws is this small in the median layer.
SETTLED = 0.05
DRAWS = 20
SAMPLES = 256


def stability(
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    source: DataSource,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Min-max ranges of every activation, over random draws of 8, 16, 32, ... of the samples.

    `draws[]`: `samples`, `deviation` (of a layer's range from that of all samples, as a share of it: 95th
    percentile over draws, median over layers), `worst_deviation` and `worst_module`. `enough`: the smallest
    number of samples whose deviation is at most SETTLED, or None. Raises DataError with fewer than 16.
    """
    names, modules, lows, highs = extremes(module, inputs, source, samples)
    count = len(lows)
    if count < 16:
        raise DataError(f"{count} samples are too few to see how ranges move; give at least 16")
    whole = highs.max(axis=0) - lows.min(axis=0)
    kept = whole > 0
    rng = np.random.default_rng(seed)
    draws = []
    size = 8
    while size <= count // 2:
        deviations = np.stack(
            [_deviation(lows, highs, whole, rng.choice(count, size, replace=False)) for _ in range(DRAWS)]
        )[:, kept]
        by_layer = np.percentile(deviations, 95, axis=0)
        worst = int(by_layer.argmax())
        draws.append(
            {
                "samples": size,
                "deviation": float(np.median(by_layer)),
                "worst_deviation": float(by_layer[worst]),
                "worst_module": np.array(modules)[kept][worst] or np.array(names)[kept][worst],
            }
        )
        size *= 2
    enough = next((d["samples"] for d in draws if d["deviation"] <= SETTLED), None)
    return {"samples": count, "layers": int(kept.sum()), "draws": draws, "enough": enough}


def _deviation(lows: np.ndarray, highs: np.ndarray, whole: np.ndarray, rows: np.ndarray) -> np.ndarray:
    drawn = highs[rows].max(axis=0) - lows[rows].min(axis=0)
    return 1 - drawn / np.where(whole > 0, whole, 1.0)


def extremes(
    module: nn.Module, inputs: Sequence[TensorSpec], source: DataSource, samples: int
) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Node names, their modules, and for each sample the smallest and largest value, [samples, nodes]."""
    zeros = tuple(torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in inputs)
    graph = capture(module, zeros)
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and _is_float(n)]
    index = {n.name: i for i, n in enumerate(nodes)}
    rows: list[np.ndarray] = []

    def keep(node: Node, value: Tensor) -> None:
        rows[-1][:, index[node.name]] = float(value.min()), float(value.max())

    total = min(samples, len(source))
    for tensors in progress.bar(_samples(source, total), "ranges", total):
        rows.append(np.zeros((2, len(nodes))))
        watch(graph, tensors, keep, frozenset(index))
    stacked = np.stack(rows) if rows else np.zeros((0, 2, len(nodes)))
    modules = [str(n.meta.get("module", "")) for n in nodes]
    return list(index), modules, stacked[:, 0], stacked[:, 1]


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _samples(source: DataSource, count: int) -> Any:
    done = 0
    for batch in source.batches(16):
        for i in range(len(batch)):
            if done == count:
                return
            done += 1
            yield [torch.from_numpy(np.ascontiguousarray(a[i : i + 1])) for a in batch.inputs]
