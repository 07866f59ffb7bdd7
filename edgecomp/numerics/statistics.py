"""Statistics of repeated measurements: percentiles, bootstrap intervals, warm-up, noise.

Pure NumPy. Times may be in any unit; ratios and verdicts have none. Randomness is seeded: the same samples
give the same interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Samples = Sequence[float] | np.ndarray

# A figure is steady when its interval is at most 2 % of the median and it drifted by at most 5 %; up to
# 10 % and 20 % it is noisy; beyond that it says nothing. `edgecomp.devices.profiler` reports the numbers too.
STEADY = (0.02, 0.05)
NOISY = (0.10, 0.20)


def _checked(samples: Samples) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64).reshape(-1)
    if values.size == 0:
        raise ValueError("no samples; expected at least one measurement")
    if not np.all(np.isfinite(values)):
        raise ValueError("samples hold NaN or Inf; every measurement must be a finite number")
    return values


def percentile(samples: Samples, q: float) -> float:
    """The q-th percentile (0 <= q <= 100) by linear interpolation between order statistics.

    Hyndman and Fan (1996), definition 7: with n sorted samples x[0..n-1] and h = (n - 1) q / 100, the
    result is x[floor h] + (h - floor h) (x[floor h + 1] - x[floor h]). For 1, 2, 3, 4 and q = 50: 2.5.
    """
    if not 0 <= q <= 100:
        raise ValueError(f"q is {q}; expected a percentage from 0 to 100")
    values = np.sort(_checked(samples))
    position = (values.size - 1) * q / 100
    low = int(np.floor(position))
    high = min(low + 1, values.size - 1)
    return float(values[low] + (position - low) * (values[high] - values[low]))


@dataclass(frozen=True)
class Interval:
    """A confidence interval, lower and upper end."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def _resampled_rows(size: int, resamples: int, block: int, generator: np.random.Generator) -> np.ndarray:
    """Row numbers [resamples, size] of a circular moving-block bootstrap (Politis and Romano, 1992)."""
    blocks = -(-size // block)
    starts = generator.integers(0, size, (resamples, blocks, 1))
    rows = (starts + np.arange(block)) % size
    return rows.reshape(resamples, -1)[:, :size]


def block_length(size: int) -> int:
    """Length of the blocks that are drawn together: the cube root of the number of samples.

    Neighbouring times are alike (frequency, temperature, other work); drawing single samples would give
    intervals that are too narrow (Künsch, 1989; the rate n^(1/3) from Hall, Horowitz and Jing, 1995).
    """
    return max(1, round(size ** (1 / 3)))


def median_interval(
    samples: Samples,
    *,
    confidence: float = 0.95,
    resamples: int | None = None,
    block: int | None = None,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the median. `block=1` draws single samples (independent ones).

    `resamples`: 2000, fewer (at least 200) for more than 20,000 samples.
    """
    values = _checked(samples)
    medians = [np.median(values[rows], axis=1) for rows in _pieces(values.size, resamples, block, seed)]
    return _ends(np.concatenate(medians), confidence)


# Values that are drawn in all, and at a time: they bound the seconds and the memory of a bootstrap.
_DRAWS = 40_000_000
_DRAWS_AT_ONCE = 2_000_000


def _pieces(size: int, resamples: int | None, block: int | None, seed: int) -> Iterator[np.ndarray]:
    """The rows of all resamples, [some, size] at a time. Raises ValueError for fewer than one."""
    count = min(2000, max(200, _DRAWS // size)) if resamples is None else resamples
    if count < 1:
        raise ValueError(f"resamples is {count}; expected 1 or more")
    at_once = max(1, _DRAWS_AT_ONCE // size)
    generator = np.random.default_rng(seed)
    for start in range(0, count, at_once):
        yield _resampled_rows(size, min(at_once, count - start), block or block_length(size), generator)


def _ends(estimates: np.ndarray, confidence: float) -> Interval:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a number between 0 and 1, such as 0.95")
    tail = 50 * (1 - confidence)
    return Interval(percentile(estimates, tail), percentile(estimates, 100 - tail))


@dataclass(frozen=True)
class Comparison:
    """Ratio of two medians (b / a) with its interval. `faster` is None when 1 lies in the interval."""

    ratio: float
    interval: Interval
    faster: Literal["a", "b"] | None


def compare_medians(
    a: Samples,
    b: Samples,
    *,
    confidence: float = 0.95,
    resamples: int | None = None,
    block: int | None = None,
    seed: int = 0,
) -> Comparison:
    """Which of two interleaved series is smaller: bootstrap of median(b) / median(a) over pairs.

    `a[i]` and `b[i]` were measured one after the other, so the same rows are drawn from both: what
    disturbed both cancels out.
    """
    first, second = _checked(a), _checked(b)
    if first.size != second.size:
        raise ValueError(f"{first.size} and {second.size} samples; interleaved series have one length")
    if np.any(first <= 0) or np.any(second <= 0):
        raise ValueError("a time is zero or negative; a ratio of medians needs positive samples")
    ratios = [
        np.median(second[rows], axis=1) / np.median(first[rows], axis=1)
        for rows in _pieces(first.size, resamples, block, seed)
    ]
    interval = _ends(np.concatenate(ratios), confidence)
    faster: Literal["a", "b"] | None = None
    if interval.low > 1:
        faster = "a"
    elif interval.high < 1:
        faster = "b"
    return Comparison(float(np.median(second) / np.median(first)), interval, faster)


def is_warm(samples: Samples, *, window: int = 5, tolerance: float = 0.03) -> bool:
    """True when the medians of the last two windows differ by at most `tolerance` of the earlier one.

    The device agent, which imports nothing of ours, holds the same rule; a test compares the two.
    """
    values = _checked(samples)
    if values.size < 2 * window:
        return False
    before = float(np.median(values[-2 * window : -window]))
    return abs(float(np.median(values[-window:])) - before) <= tolerance * before


@dataclass(frozen=True)
class Noise:
    """How far a series of times can be trusted.

    `interval_width`: width of the median's interval over the median. `drift`: median of the last third
    over that of the first third, minus 1. `spread`: p95 over p50, minus 1. `verdict` follows from the
    first two: a few slow runs do not move a median.
    """

    verdict: Literal["steady", "noisy", "unusable"]
    interval_width: float
    drift: float
    spread: float


def noise(samples: Samples, *, interval: Interval | None = None) -> Noise:
    """The noise verdict of a series of positive times, in the order in which they were measured.

    `interval`: that of the median, when it is known already.
    """
    values = _checked(samples)
    median = float(np.median(values))
    if median <= 0:
        raise ValueError(f"the median is {median}; times must be positive")
    interval = interval or median_interval(values)
    width = (interval.high - interval.low) / median
    third = max(1, values.size // 3)
    drift = float(np.median(values[-third:]) / np.median(values[:third])) - 1
    spread = percentile(values, 95) / median - 1
    verdict: Literal["steady", "noisy", "unusable"] = "unusable"
    if width <= STEADY[0] and abs(drift) <= STEADY[1]:
        verdict = "steady"
    elif width <= NOISY[0] and abs(drift) <= NOISY[1]:
        verdict = "noisy"
    return Noise(verdict, width, drift, spread)
