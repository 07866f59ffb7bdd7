"""The preprocessing detective: which of the usual causes explains outputs that disagree.

Every cause is tried on the right side; the one whose outputs come closest to the observed ones is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from edgecomp.errors import DataError
from edgecomp.numerics import metrics
from edgecomp.parity.causes import Arrays, Cause, all_causes
from edgecomp.parity.observe import Reference
from edgecomp.spec import DataSource, Preprocessing, TensorSpec

# Prepares the raw data in a given way; None: it cannot be prepared again.
Prepare = Callable[[Preprocessing], DataSource]

SAMPLES = 32
# Outputs this close need no explanation; a cause must gain this much to be named; and one this close to the
# best cannot be told from it.
AGREE_DB = 30.0
SAME_FILE_DB = 45.0
GAIN_DB = 3.0
TIE_DB = 0.5
# Equal to the last bit; JSON has no infinity.
IDENTICAL_DB = 200.0


@dataclass(frozen=True)
class Case:
    """What is known: how the right side computes, its inputs and outputs, and the observed outputs.

    `exact`: both sides run the same file, so that the right cause reproduces the outputs nearly bit by bit.
    """

    model: Reference
    inputs: Arrays
    expected: Arrays
    observed: Arrays
    how: Preprocessing | None = None
    prepare: Prepare | None = None
    specs: Sequence[TensorSpec] = ()
    exact: bool = False

    @property
    def agree_db(self) -> float:
        return SAME_FILE_DB if self.exact else AGREE_DB


def diagnose(case: Case) -> dict[str, Any]:
    """`agree`, `baseline_db`, `causes[]` (`name`, `says`, `sqnr_db`, `top1_agreement`) best first, `verdict`.

    The verdict names one cause, several that cannot be told apart, or none. After the best single cause the
    others are tried on top of it, and a pair is named when it explains more.
    Raises DataError when observed outputs have another shape than the model's.
    """
    _check(case)
    baseline = closeness(case.expected, case.observed)
    if baseline >= case.agree_db:
        return _report(True, baseline, [], "outputs agree; there is nothing to explain")
    causes = all_causes(case.how, case.specs, case.inputs, case.expected, pictures=case.prepare is not None)
    tried = [_tried(c, outputs_under(case, c), case.observed) for c in causes]
    fitted = affine_outputs(case)
    if fitted is not None:
        tried.append(fitted)
    tried.sort(key=lambda t: -t["sqnr_db"])
    if tried and tried[0]["sqnr_db"] < case.agree_db:
        tried = _with_pairs(case, causes, tried)
    return _report(False, baseline, tried, verdict(baseline, tried))


def outputs_under(case: Case, cause: Cause, before: Cause | None = None) -> Arrays:
    """What the right side gives when it does what the cause says (after `before`, if given)."""
    inputs = case.inputs
    for step in (before, cause):
        if step is None:
            continue
        if step.preprocessing is not None and case.prepare is not None:
            source = case.prepare(step.preprocessing)
            inputs = next(iter(source.batches(len(case.inputs[0])))).inputs
        elif step.inputs is not None:
            inputs = step.inputs(inputs)
    changed = any(s is not None and s.outputs is None for s in (before, cause))
    outputs = tuple(np.asarray(o) for o in case.model(inputs)) if changed else case.expected
    for step in (before, cause):
        if step is not None and step.outputs is not None:
            outputs = step.outputs(outputs)
    return outputs


def closeness(expected: Sequence[np.ndarray], observed: Sequence[np.ndarray]) -> float:
    """SQNR of the worst output, in dB; outputs that are not finite: -inf."""
    values = []
    for e, o in zip(expected, observed, strict=True):
        if not np.isfinite(e).all():
            return -np.inf
        values.append(metrics.sqnr_db(o, e))
    return min(float(min(values)), IDENTICAL_DB)


def affine_outputs(case: Case) -> dict[str, Any] | None:
    """Wrong quantization parameters at the output: observed = gain * expected + offset, fitted."""
    e, o = case.expected[0].astype(np.float64).ravel(), case.observed[0].astype(np.float64).ravel()
    if e.std() == 0 or o.std() == 0:
        return None
    gain, offset = np.polyfit(e, o, 1)
    if abs(gain - 1) < 0.02 and abs(offset) < 0.02 * e.std():
        return None
    cause = Cause(
        "output scale and zero point",
        f"outputs are {gain:.4g} times the right ones, plus {offset:.4g}: another scale or zero point",
        outputs=lambda outputs: (outputs[0] * gain + offset, *outputs[1:]),
    )
    return _tried(cause, outputs_under(case, cause), case.observed)


def _tried(cause: Cause, outputs: Arrays, observed: Arrays) -> dict[str, Any]:
    agreement = None
    if observed[0].ndim == 2 and observed[0].shape[1] > 1 and outputs[0].shape == observed[0].shape:
        agreement = metrics.top1_agreement(observed[0], outputs[0])
    return {
        "name": cause.name,
        "says": cause.says,
        "sqnr_db": closeness(outputs, observed),
        "top1_agreement": agreement,
    }


def _with_pairs(case: Case, causes: Sequence[Cause], tried: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best cause together with each other one; kept when it gains GAIN_DB over the best alone."""
    best = next((c for c in causes if c.name == tried[0]["name"]), None)
    if best is None:
        return tried
    pairs = []
    for other in causes:
        if other is best or (other.preprocessing is not None and best.preprocessing is not None):
            continue
        for before, after in _orders(best, other):
            cause = Cause(f"{before.name} + {after.name}", f"{before.says}, and {after.says}")
            pairs.append(_tried(cause, outputs_under(case, after, before), case.observed))
    better = [p for p in pairs if p["sqnr_db"] > tried[0]["sqnr_db"] + GAIN_DB]
    return sorted([*better, *tried], key=lambda t: -t["sqnr_db"])


def _orders(a: Cause, b: Cause) -> list[tuple[Cause, Cause]]:
    """Pictures are prepared first, then inputs are changed, then outputs; two of a kind in both orders."""
    ranks = [0 if c.preprocessing is not None else 1 if c.inputs is not None else 2 for c in (a, b)]
    if ranks[0] == ranks[1]:
        return [(a, b), (b, a)]
    return [(a, b)] if ranks[0] < ranks[1] else [(b, a)]


def verdict(baseline: float, tried: Sequence[dict[str, Any]]) -> str:
    """One sentence that names the cause."""
    if not tried or tried[0]["sqnr_db"] < baseline + GAIN_DB:
        return (
            "none of the usual causes explains the difference; look for the layer that diverges with "
            "`edgecomp parity --ladder`"
        )
    best = tried[0]
    ties = [t["name"] for t in tried[1:] if t["sqnr_db"] > best["sqnr_db"] - TIE_DB]
    doubt = f" (these explain it as well: {', '.join(ties)})" if ties else ""
    partly = "" if best["sqnr_db"] >= AGREE_DB / 2 else ", in part"
    return f"{best['name']}: {best['says']}; that explains the difference{partly}{doubt}"


def contract_differences(artifact: Preprocessing | None, model: Preprocessing | None) -> list[str]:
    """Fields in which the artifact's own preprocessing is not the model's."""
    if artifact is None or model is None:
        return []
    return [
        f"{f.name}: the artifact says {getattr(artifact, f.name)}, the model takes {getattr(model, f.name)}"
        for f in fields(Preprocessing)
        if getattr(artifact, f.name) != getattr(model, f.name)
    ]


def _check(case: Case) -> None:
    wanted, found = [e.shape for e in case.expected], [o.shape for o in case.observed]
    if wanted != found:
        raise DataError(
            f"observed outputs have shape {found}, the model gives {wanted}; they must be outputs for "
            "the same samples, in the same order"
        )


def _report(agree: bool, baseline: float, tried: list[dict[str, Any]], sentence: str) -> dict[str, Any]:
    cause = None
    if tried and tried[0]["sqnr_db"] >= baseline + GAIN_DB:
        cause = tried[0]["name"]
    return {
        "agree": agree,
        "baseline_db": baseline,
        "cause": cause,
        "causes": tried[:10],
        "verdict": sentence,
    }
