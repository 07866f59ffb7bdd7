"""Is this calibration data fit for use? One pass, bounded memory, findings with their consequence.

What is kept for each sample: its digest, mean, standard deviation and roughness; histograms are per channel.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from edgecomp.errors import DataError
from edgecomp.spec import Batch, DataSource

# Fewer samples than this leave min-max ranges that still move from draw to draw; 100 to 500 samples is
# what TensorFlow Lite's and ONNX Runtime's guides ask for.
FEW_SAMPLES = 100
# Neighbouring values of a picture or a sound are alike; of noise they are not. Ratio of the variance of
# neighbours' differences to twice the variance: 1 for white noise, below 0.5 for natural signals.
NOISE_ROUGHNESS = 0.85


@dataclass(frozen=True)
class Finding:
    """`level` error: unfit; warning: fit with care."""

    level: Literal["error", "warning"]
    check: str
    message: str


@dataclass
class Survey:
    """What one pass saw."""

    samples: int = 0
    shape: tuple[int, ...] = ()
    lows: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    deviations: list[float] = field(default_factory=list)
    roughness: list[float] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    classes: Counter[int] = field(default_factory=Counter)
    has_targets: bool = False
    integral: bool = True

    def add(self, batch: Batch) -> None:
        self.shape = tuple(batch.inputs[0].shape[1:])
        for i in range(len(batch)):
            values = [np.asarray(a[i], np.float64) for a in batch.inputs]
            main = values[0]
            self.lows.append(float(main.min()))
            self.highs.append(float(main.max()))
            self.means.append(float(main.mean()))
            self.deviations.append(float(main.std()))
            self.roughness.append(roughness(main))
            self.digests.append(_digest(batch, i))
            row = batch.rows[i] if batch.rows else {}
            self.names.append(str(row.get("path", self.samples + i)))
            self.integral = self.integral and bool(np.all(main == np.rint(main)))
        if batch.targets is not None:
            self.has_targets = True
            if batch.targets.ndim == 1 and batch.targets.dtype.kind in "iu":
                self.classes.update(int(t) for t in batch.targets)
        self.samples += len(batch)


def _digest(batch: Batch, i: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in batch.inputs:
        digest.update(np.ascontiguousarray(array[i]).tobytes())
    return digest.digest()


def roughness(sample: np.ndarray) -> float:
    """Variance of the differences of neighbours along the longest axis, over twice the variance.

    White noise: 1. A constant: NaN. Von Neumann's ratio (1941), halved.
    """
    if sample.ndim == 0 or sample.std() == 0:
        return float("nan")
    axis = int(np.argmax(sample.shape))
    steps = np.diff(sample, axis=axis)
    if steps.size < 8:
        return float("nan")
    centred = sample - sample.mean(axis=axis, keepdims=True)
    spread = float(np.mean(centred**2))
    return float(np.mean(steps**2) / (2 * spread)) if spread > 0 else float("nan")


def survey(source: DataSource, *, batch_size: int = 32, limit: int | None = None) -> Survey:
    """One pass over the data. Raises DataError from the source (undecodable files, NaN or Inf)."""
    seen = Survey()
    for batch in source.batches(batch_size):
        seen.add(batch)
        if limit is not None and seen.samples >= limit:
            break
    return seen


def audit(
    source: DataSource, evaluation: DataSource | None = None, *, limit: int | None = None
) -> dict[str, Any]:
    """Facts about the data, findings, and `fit` (no finding is an error).

    `evaluation`: data whose ranges and classes the calibration data should resemble. What the source itself
    refuses (NaN, undecodable) is one finding with level error.
    """
    try:
        seen = survey(source, limit=limit)
    except DataError as error:
        return _report(Survey(), [Finding("error", "readable", str(error))], len(source))
    findings = [
        *count_findings(seen),
        *duplicate_findings(seen),
        *class_findings(seen, source.labels),
        *value_findings(seen),
        *preprocessing_findings(seen, source),
    ]
    if evaluation is not None:
        findings += range_findings(seen, survey(evaluation, limit=limit))
    return _report(seen, findings, len(source))


def _report(seen: Survey, findings: Sequence[Finding], total: int) -> dict[str, Any]:
    return {
        "samples": total,
        "samples_read": seen.samples,
        "shape": list(seen.shape),
        "classes": {str(k): v for k, v in sorted(seen.classes.items())},
        "distinct": len(set(seen.digests)),
        "low": min(seen.lows, default=None),
        "high": max(seen.highs, default=None),
        "mean": float(np.mean(seen.means)) if seen.means else None,
        "findings": [asdict(f) for f in findings],
        "fit": not any(f.level == "error" for f in findings),
    }


def count_findings(seen: Survey) -> list[Finding]:
    if seen.samples >= FEW_SAMPLES:
        return []
    message = (
        f"{seen.samples} samples; with fewer than {FEW_SAMPLES} the ranges depend on which ones were drawn: "
        "add samples"
    )
    return [Finding("warning", "samples", message)]


def duplicate_findings(seen: Survey) -> list[Finding]:
    counts = Counter(seen.digests)
    extra = seen.samples - len(counts)
    if not extra:
        return []
    digest, times = counts.most_common(1)[0]
    name = seen.names[seen.digests.index(digest)]
    share = extra / seen.samples
    message = (
        f"{extra} of {seen.samples} samples ({share:.0%}) repeat another exactly; {name} is there {times} "
        "times: remove the copies"
    )
    return [Finding("error" if share > 0.5 else "warning", "duplicates", message)]


def class_findings(seen: Survey, labels: Sequence[str]) -> list[Finding]:
    if not seen.classes:
        return []
    found = []
    if labels:
        missing = [name for i, name in enumerate(labels) if not seen.classes[i]]
        if missing:
            message = f"{len(missing)} of {len(labels)} classes have no sample: {', '.join(missing[:8])}"
            found.append(Finding("warning", "classes", message + ": add some of each"))
    counts = sorted(seen.classes.values())
    if len(counts) > 1 and counts[-1] > 10 * counts[0]:
        message = f"classes have {counts[0]} to {counts[-1]} samples: balance them"
        found.append(Finding("warning", "balance", message))
    if len(counts) == 1 and len(labels) > 1:
        only = next(iter(seen.classes))
        message = f"all samples are of class {only}: ranges of the other classes are not seen"
        found.append(Finding("error", "classes", message))
    return found


def value_findings(seen: Survey) -> list[Finding]:
    found = []
    constant = [n for n, d in zip(seen.names, seen.deviations, strict=True) if d == 0]
    if constant:
        message = f"{len(constant)} samples are constant ({constant[0]} is the first): remove them"
        level: Literal["error", "warning"] = "error" if len(constant) > seen.samples / 2 else "warning"
        found.append(Finding(level, "constant", message))
    rough = np.asarray(seen.roughness)
    rough = rough[np.isfinite(rough)]
    if len(seen.shape) >= 2 and rough.size and float(np.median(rough)) > NOISE_ROUGHNESS:
        message = (
            f"neighbouring values are unrelated (roughness {np.median(rough):.2f}; noise has 1, pictures and "
            "sounds less than 0.5): this looks like random data, whose ranges say nothing about real inputs"
        )
        found.append(Finding("error", "random", message))
    return found


def preprocessing_findings(seen: Survey, source: DataSource) -> list[Finding]:
    """Do the values agree with the preprocessing that the data claims to have had?"""
    low, high = min(seen.lows), max(seen.highs)
    how = source.preprocessing
    if how is None or how.sample_rate is not None:
        if how is None and len(seen.shape) == 3 and seen.integral and low >= 0 and 1 < high <= 255:
            message = f"values are whole numbers from {low:g} to {high:g}: are they raw pixels?"
            return [Finding("warning", "preprocessing", message)]
        return []
    allowed = how.exact_range()
    slack = 1e-3 * (allowed[1] - allowed[0])
    if low < allowed[0] - slack or high > allowed[1] + slack:
        message = (
            f"values lie from {low:.4g} to {high:.4g}; with mean {how.mean} and std {how.std} a pixel can "
            f"only become {allowed[0]:.4g} to {allowed[1]:.4g}: the data was prepared in another way"
        )
        return [Finding("error", "preprocessing", message)]
    if (high - low) < 0.1 * (allowed[1] - allowed[0]):
        message = (
            f"values span {low:.4g} to {high:.4g}, less than a tenth of what the preprocessing allows "
            f"({allowed[0]:.4g} to {allowed[1]:.4g}): normalized twice?"
        )
        return [Finding("error", "preprocessing", message)]
    return []


def range_findings(seen: Survey, other: Survey) -> list[Finding]:
    """Calibration against evaluation: shape, range, and the distribution of the samples' means."""
    if seen.shape != other.shape:
        message = f"samples have shape {seen.shape}, those of the evaluation data {other.shape}"
        return [Finding("error", "shape", message)]
    found = []
    span = max(other.highs) - min(other.lows) or 1.0
    beyond = max(max(other.highs) - max(seen.highs), min(seen.lows) - min(other.lows)) / span
    if beyond > 0.1:
        message = (
            f"the evaluation data reaches from {min(other.lows):.4g} to {max(other.highs):.4g}, this data "
            f"from {min(seen.lows):.4g} to {max(seen.highs):.4g}: {beyond:.0%} of the range would be clipped"
        )
        found.append(Finding("error" if beyond > 0.5 else "warning", "range", message))
    deviation = float(np.std(other.means)) or 1e-12
    shift = abs(float(np.mean(seen.means)) - float(np.mean(other.means))) / deviation
    if shift > 1.0:
        message = (
            f"the mean of a sample is {np.mean(seen.means):.4g} here, {np.mean(other.means):.4g} in the "
            f"evaluation data, {shift:.1f} standard deviations away: another preprocessing, or other content"
        )
        found.append(Finding("error" if shift > 3 else "warning", "shift", message))
    missing = set(other.classes) - set(seen.classes) if seen.classes else set()
    if missing:
        names = ", ".join(str(c) for c in sorted(missing)[:8])
        found.append(Finding("warning", "classes", f"classes of the evaluation data are missing: {names}"))
    shared = len(set(seen.digests) & set(other.digests))
    if shared:
        message = f"{shared} samples are in both sets: accuracy on them is too good to be believed"
        found.append(Finding("warning", "leak", message))
    return found
