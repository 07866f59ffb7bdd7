"""How close two sets of outputs are, how good they are, and how sure we can be of a difference.

Pure NumPy. `reference` is the float model's output, `test` the artifact's, both [N, ...] of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Z95 = 1.959963984540054


def _pair(reference: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(reference, np.float64), np.asarray(test, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: reference {a.shape}, test {b.shape}")
    if a.size == 0:
        raise ValueError("no values; expected at least one")
    return a, b


def sqnr_db(reference: np.ndarray, test: np.ndarray) -> float:
    """Signal to quantization noise ratio, 10 log10(sum r^2 / sum (r - t)^2), in dB.

    Oppenheim and Schafer, Discrete-Time Signal Processing, sec. 4.8.3. Identical arrays: inf. An all-zero
    reference with a test that is not: -inf. Example: r = [3, 4], t = [3, 3]: 10 log10(25 / 1) = 13.98 dB.
    """
    a, b = _pair(reference, test)
    return ratio_db(float(np.sum(a * a)), float(np.sum((a - b) ** 2)))


def ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two energies; no noise: inf, noise without signal: -inf, NaN stays."""
    if math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def cosine(reference: np.ndarray, test: np.ndarray) -> float:
    """Mean over the samples of r.t / (|r| |t|). Two zero vectors: 1. One zero vector: 0."""
    a, b = _pair(reference, test)
    return float(np.mean(cosines(a, b)))


def cosines(reference: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Cosine of each sample, [N]."""
    a, b = _pair(reference, test)
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    both_zero = (norms[0] == 0) & (norms[1] == 0)
    product = norms[0] * norms[1]
    safe = np.where(product == 0, 1.0, product)
    return np.where(both_zero, 1.0, np.sum(a * b, axis=1) / safe)


def max_abs_error(reference: np.ndarray, test: np.ndarray) -> float:
    """Largest |r - t|, in the unit of the output."""
    a, b = _pair(reference, test)
    return float(np.max(np.abs(a - b)))


def top1_agreement(reference: np.ndarray, test: np.ndarray) -> float:
    """Share of samples whose largest score [N, classes] is at the same class. Ties: the first."""
    a, b = _pair(reference, test)
    return float(np.mean(a.argmax(axis=-1) == b.argmax(axis=-1)))


def accuracy(scores: np.ndarray, targets: np.ndarray) -> float:
    """Share of samples whose largest score [N, classes] is at their target [N]."""
    return float(np.mean(np.asarray(scores).argmax(axis=-1) == targets))


def softmax(scores: np.ndarray) -> np.ndarray:
    """exp(s - max s) / sum, along the last axis, float64."""
    shifted = np.asarray(scores, np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Scores [N, classes] as probabilities: taken as they are when they already are, else softmax.

    Already: no value below 0, and each row sums to 1 within 0.1 (256 levels of softmax output round).
    """
    values = np.asarray(scores, np.float64)
    sums = values.sum(axis=-1)
    if values.min() >= 0 and np.all(np.abs(sums - 1) < 0.1):
        return values / sums[..., None]
    return softmax(values)


def expected_calibration_error(probability: np.ndarray, targets: np.ndarray, *, bins: int = 15) -> float:
    """ECE: sum over bins of |B|/N * |accuracy(B) - confidence(B)|, bins of equal width in confidence.

    Guo et al., On Calibration of Modern Neural Networks (2017), eq. 3, with their 15 bins.
    `probability` [N, classes], `targets` [N].
    """
    p = np.asarray(probability, np.float64)
    return calibration_error(p.max(axis=1), p.argmax(axis=1) == targets, bins=bins)


def calibration_error(confidence: np.ndarray, hit: np.ndarray, *, bins: int = 15) -> float:
    """The same from the confidence [N] of each prediction and whether it was right [N]."""
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(which, weights=hit - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def brier(probability: np.ndarray, targets: np.ndarray) -> float:
    """Mean over samples of sum over classes of (p - onehot)^2, from 0 (sure and right) to 2.

    Brier, Verification of Forecasts Expressed in Terms of Probability (1950), eq. 2.
    """
    p = np.asarray(probability, np.float64)
    picked = p[np.arange(len(p)), targets]
    return float(np.mean(np.sum(p * p, axis=1) - 2 * picked + 1))


def mcnemar_exact(only_reference: int, only_test: int) -> float:
    """Two-sided exact p-value that the two are equally often right, from the pairs that differ.

    McNemar (1947), in the exact form: twice the smaller tail of Binomial(b + c, 1/2), at most 1.
    `only_reference`: right in the reference alone; `only_test`: right in the test alone.
    """
    n, k = only_reference + only_test, min(only_reference, only_test)
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    tail = sum(math.exp(term - n * math.log(2)) for term in logs)
    return min(1.0, 2 * tail)


def wilson_interval(successes: int, count: int, *, z: float = Z95) -> tuple[float, float]:
    """Score interval of a proportion. Wilson (1927): centre (p + z^2/2n) / (1 + z^2/n).

    100 of 100 at 95 %: (0.963, 1.0); it never claims certainty from few samples.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"{successes} of {count}; expected 0 <= successes <= count and count >= 1")
    p, q = successes / count, z * z / count
    centre = (p + q / 2) / (1 + q)
    half = math.sqrt(p * (1 - p) * q + q * q / 4) / (1 + q)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == count else min(1.0, centre + half)


def paired_difference_interval(gained: int, lost: int, count: int, *, z: float = Z95) -> tuple[float, float]:
    """Score interval of (gained - lost) / count, the difference of two paired proportions.

    Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17 (1998), eq. 8-10; the ends are found by bisection. It keeps its level
    when hardly any pair differs, where a bootstrap would say (0, 0): 0 and 0 of 20 gives (-0.161, 0.161).
    """
    if count < 1 or gained < 0 or lost < 0 or gained + lost > count:
        raise ValueError(f"gained {gained} and lost {lost} of {count}; expected a part of the pairs each")
    point = (gained - lost) / count

    def score(delta: float) -> float:
        return abs(_tango_score(gained, lost, count, delta)) - z

    return _bisect(score, point, -1.0), _bisect(score, point, 1.0)


def _tango_score(x: int, y: int, n: int, delta: float) -> float:
    a = 2.0 * n
    b = -x - y + (2 * n - x + y) * delta
    c = -y * delta * (1 - delta)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * q + delta * (1 - delta))
    if variance <= 0:
        return 0.0 if abs(x - y - n * delta) < 1e-12 else math.inf
    return (x - y - n * delta) / math.sqrt(variance)


def _bisect(excess: Callable[[float], float], inside: float, outside: float) -> float:
    if excess(outside * (1 - 1e-12)) < 0:
        return outside
    for _ in range(100):
        middle = (inside + outside) / 2
        if excess(middle) > 0:
            outside = middle
        else:
            inside = middle
    return inside


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic(rows)`, rows being resampled sample numbers [count].

    Efron (1979). Paired: the statistic looks the same rows up in reference and test. NaNs are left out.
    """
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(0, count, count)) for _ in range(resamples)])
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def samples_for_proportion(expected: float, margin: float, *, z: float = Z95) -> int:
    """Samples for an interval of a proportion to reach `margin` to either side: n = z^2 p (1 - p) / m^2.

    Cochran, Sampling Techniques (1977), eq. 4.1, and at least as many as Wilson's interval needs at 0 or 1.
    """
    if margin <= 0:
        raise ValueError(f"margin is {margin}; expected a positive number")
    extreme = z * z * (1 - margin) / margin
    middle = z * z * expected * (1 - expected) / margin**2
    return math.ceil(max(extreme, middle) if expected in (0.0, 1.0) else max(middle, 1.0))
