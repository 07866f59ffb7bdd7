"""How many bits each weight gets under a size budget: 4, 6 or 8 where they help the output most per byte.

The error that a layer's rounding adds to the output is estimated by the Fisher information of its weights,
sum F (w - palette)^2 (`coreml_importance`); every two bits more divide it by 16, as they do for a uniform
grid (Gersho and Gray, "Vector Quantization and Signal Compression", 1992, section 5.6).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgecomp.errors import InputError

_STEPS = {4: 6, 6: 8}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "KIB": 2**10, "MIB": 2**20}


@dataclass(frozen=True)
class Layer:
    """`error`: what 4 bits add to the output. `bytes_of`: bits -> bytes of the weight with its palettes."""

    name: str
    error: float
    bytes_of: Mapping[int, int]


def parse(size: str | int) -> int:
    """`3.2MB` -> 3,200,000 bytes. Raises InputError."""
    text = str(size).strip().upper().replace("_", "")
    number = text.rstrip("KMIB ")
    unit = text[len(number) :].strip()
    try:
        found = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        found = 0.0
    if found < 1:
        raise InputError(
            f"size is {size!r}; expected bytes, or a number with kB, MB, KiB or MiB, such as 3.2MB"
        )
    return int(found)


def choose(layers: list[Layer], spare: int) -> dict[str, int]:
    """Bits of each layer so that all together take at most `spare` bytes more than 4 bits everywhere.

    The step with the most error removed per byte comes first; one that no longer fits is passed over.
    """
    bits = {layer.name: 4 for layer in layers}
    waiting: list[tuple[float, int, Layer]] = []

    def offer(layer: Layer, order: int) -> None:
        now = bits[layer.name]
        if now in _STEPS:
            cost = max(layer.bytes_of[_STEPS[now]] - layer.bytes_of[now], 1)
            gain = layer.error * (1 - 1 / 16) / 16 ** ((now - 4) // 2)
            heapq.heappush(waiting, (-gain / cost, order, layer))

    for order, layer in enumerate(layers):
        offer(layer, order)
    while waiting:
        _, order, layer = heapq.heappop(waiting)
        now = bits[layer.name]
        cost = layer.bytes_of[_STEPS[now]] - layer.bytes_of[now]
        if cost <= spare:
            spare -= cost
            bits[layer.name] = _STEPS[now]
            offer(layer, order)
    return bits


def bytes_of(count: int, channels: int, group: Callable[[int], int]) -> dict[int, int]:
    """Bits -> bytes of `count` weights: indices and float16 palettes, or int8 and float16 scales."""
    found = {b: -(-count * b // 8) + channels // group(b) * (2 << b) for b in (4, 6)}
    return {**found, 8: count + 2 * channels}


def rounding_error(weight: np.ndarray, restored: np.ndarray, importance: np.ndarray | None) -> float:
    """sum F (w - restored)^2; F = 1 where it is not known."""
    squared = np.square(weight.astype(np.float64) - restored)
    return float((squared if importance is None else squared * importance).sum())
