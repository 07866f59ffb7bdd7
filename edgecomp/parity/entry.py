"""One artifact against the float model: one entry of the parity JSON (docs/parity.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp import files, manifest, registry
from edgecomp.errors import ArtifactError, DataError
from edgecomp.numerics import metrics
from edgecomp.parity import corrupted
from edgecomp.parity import flips as flipping
from edgecomp.parity import gates as gating
from edgecomp.parity import metric as tasks
from edgecomp.parity import slices as slicing
from edgecomp.parity.observe import Observations, OutputTally, Reference, observe
from edgecomp.spec import Artifact, DataSource, Session

AS_WRITTEN = "as written"
OPTIMIZED = "optimized"

# The optimized session is said to differ when it loses this much against the graph as written.
NOTABLE_DB = 3.0


def compare(
    reference: Reference,
    artifact_path: Path,
    source: DataSource,
    *,
    metric: tasks.Metric | None = None,
    gates: Sequence[str] = (),
    slices: Sequence[str] = (slicing.CLASS,),
    corruptions: Sequence[str] = (),
    changed: Mapping[str, DataSource] | None = None,
    threads: int = 1,
    batch_size: int = 32,
    limit: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run both over the data and say how far apart they are.

    `reference`: a callable from a tuple of arrays [N, ...] to the float model's outputs [N, ...].
    `metric` None: accuracy or RMSE where the data has targets of such a form. `limit`: first samples only.
    `slices`: metadata columns, and `class` for the target. `corruptions`: names, see `corrupted`; `changed`:
    further changed sources by name, such as adversarial ones. `more`: facts of the caller that belong to the
    entry, for gates to look at.
    An ONNX file is run twice, as written and optimized; the figures (and the gates) are of the graph as
    written, `optimized` holds the other's. All other formats run as they would be deployed.
    Raises ArtifactError, DataError, MissingError, and InputError for a gate that cannot be read.
    """
    conditions = gating.parse_all(gates)
    artifact_path = Path(artifact_path)
    described = describe(artifact_path)
    if described is not None:
        check_labels(described, source)
    runtime, sessions = open_sessions(artifact_path, threads)
    seen = observe(reference, sessions, source, metric=metric, batch_size=batch_size, limit=limit)
    names = list(sessions)
    entry: dict[str, Any] = {
        "path": str(artifact_path),
        "target": described.target if described else registry.format_of(artifact_path.suffix),
        "runtime": f"{runtime.name} {runtime.version} ({names[0]})",
        **figures(seen, names[0]),
        "optimized": optimized_figures(seen) if len(names) > 1 else None,
        **slicing.slice_figures(seen, names[0], slices, source.labels),
        "corruptions": [],
        "size_bytes": files.size_bytes(artifact_path),
        **(more or {}),
    }
    ends = slicing.family_ends(entry["slices"])
    entry["intervals"]["worst_slice.delta"] = ends
    entry["flips"]["examples"] = flipping.negative_flips(seen, names[0], source.labels)
    if corruptions or changed:
        entry["corruptions"] = corrupted.ladder(
            reference, sessions[names[0]], source, corruptions, metric=metric, more=changed
        )
        entry["worst_corruption"] = worst_corruption(entry["corruptions"])
    entry["notes"] = notes(entry)
    entry["gates"] = [c.check(entry) for c in conditions]
    entry["passed"] = all(g["passed"] for g in entry["gates"])
    return entry


def worst_corruption(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The corruption under which the artifact loses most beyond what the float model loses."""
    measured = [r for r in rows if r["excess_loss"] is not None]
    return max(measured, key=lambda r: r["excess_loss"]) if measured else None


def document(reference: str, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The parity JSON: the name of the reference and one entry for each artifact."""
    return {"reference": reference, "artifacts": list(entries)}


def describe(path: Path) -> Artifact | None:
    """The artifact's manifest, or None for a file that edgecomp did not write."""
    if not path.exists():
        raise ArtifactError(
            f"no artifact at {path}; expected a .tflite or .onnx file or an .mlpackage folder"
        )
    return manifest.read(path) if manifest.path_of(path).exists() else None


def check_labels(artifact: Artifact, source: DataSource) -> None:
    """Raise DataError when class numbers mean one thing in the data and another in the artifact."""
    ours, theirs = artifact.labels, source.labels
    if ours and theirs and ours != theirs:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        where = f"class {at} is {ours[at]!r} and {theirs[at]!r}" if at is not None else "their numbers differ"
        raise DataError(
            f"{artifact.path} was made with {len(ours)} labels, the data has {len(theirs)}; {where}: "
            "use data with the artifact's labels, in its order"
        )


def open_sessions(path: Path, threads: int) -> tuple[Any, dict[str, Session]]:
    """The runtime for the artifact's suffix, and its sessions: the first is the one that is judged."""
    form = registry.format_of(path.suffix)
    if form not in registry.names("runtimes"):
        raise ArtifactError(
            f"{path} is no artifact; expected a .tflite or .onnx file or an .mlpackage folder"
        )
    runtime = registry.load("runtimes", form)()
    if form != "onnx":
        return runtime, {OPTIMIZED: runtime.open(path, threads=threads, optimize=True)}
    return runtime, {
        AS_WRITTEN: runtime.open(path, threads=threads, optimize=False),
        OPTIMIZED: runtime.open(path, threads=threads, optimize=True),
    }


def figures(seen: Observations, name: str) -> dict[str, Any]:
    """Agreement, error, metric, flips and calibration of one session, with 95 % intervals."""
    test, reference = seen.tests[name], seen.reference
    predicted = reference.joined("predicted"), test.joined("predicted")
    facts: dict[str, Any] = {
        "samples": seen.samples,
        "top1_agreement": None,
        **worst(seen.outputs[name]),
        "metric": None,
        "drop": None,
        "flips": {"negative": None, "positive": None, "p_value": None},
        "calibration": None,
        "distribution": seen.distributions[name].facts(),
        "outputs": [facts_of(t) for t in seen.outputs[name]],
        "intervals": {"top1_agreement": None, "metric.delta": None, "drop": None},
        "shares": ["top1_agreement"],
    }
    if predicted[0] is not None and predicted[1] is not None:
        agreeing = int(np.sum(predicted[0] == predicted[1]))
        facts["top1_agreement"] = agreeing / seen.samples
        facts["intervals"]["top1_agreement"] = metrics.wilson_interval(agreeing, seen.samples)
    measured = seen.measured(name)
    if measured is not None:
        facts |= metric_figures(*measured, facts["intervals"])
        if measured[0].binary:
            facts["shares"] += ["metric.delta", "drop"]
    facts["calibration"] = calibration(seen, name)
    return facts


def metric_figures(
    metric: tasks.Metric, reference: np.ndarray, test: np.ndarray, intervals: dict[str, Any]
) -> dict[str, Any]:
    values = metric.value(reference), metric.value(test)
    ends = tasks.difference_interval(metric, reference, test)
    intervals["metric.delta"] = ends
    sign = -1.0 if metric.higher_is_better else 1.0
    intervals["drop"] = None if ends is None else tuple(sorted(sign * e for e in ends))
    facts: dict[str, Any] = {
        "drop": sign * (values[1] - values[0]),
        "metric": {
            "name": metric.name,
            "reference": values[0],
            "artifact": values[1],
            "delta": values[1] - values[0],
            "ci95": list(ends),
            "higher_is_better": metric.higher_is_better,
        },
    }
    if metric.binary:
        negative = int(np.sum((reference > 0.5) & (test < 0.5)))
        positive = int(np.sum((reference < 0.5) & (test > 0.5)))
        p_value = metrics.mcnemar_exact(negative, positive)
        facts["flips"] = {"negative": negative, "positive": positive, "p_value": p_value}
    return facts


def calibration(seen: Observations, name: str) -> dict[str, Any] | None:
    """ECE and Brier score of both, and how the mean confidence moved; None unless it is a classifier."""
    sides = seen.reference, seen.tests[name]
    if any(s.joined("squared") is None for s in sides):
        return None
    facts: dict[str, Any] = {}
    for who, side in zip(("reference", "artifact"), sides, strict=True):
        confidence, predicted = np.concatenate(side.confidence), np.concatenate(side.predicted)
        facts[who] = {
            "ece": metrics.calibration_error(confidence, predicted == seen.targets),
            "brier": float(np.concatenate(side.squared).mean()),
            "confidence": float(confidence.mean()),
        }
    facts["confidence_shift"] = facts["artifact"]["confidence"] - facts["reference"]["confidence"]
    return facts


def worst(tallies: Sequence[OutputTally]) -> dict[str, float]:
    """Over several outputs, the figures of the worst."""
    return {
        "sqnr_db": min(t.sqnr_db for t in tallies),
        "cosine": min(t.cosine for t in tallies),
        "max_abs_error": max(t.max_abs_error for t in tallies),
    }


def facts_of(tally: OutputTally) -> dict[str, Any]:
    return {
        "name": tally.name,
        "sqnr_db": tally.sqnr_db,
        "cosine": tally.cosine,
        "max_abs_error": tally.max_abs_error,
        "identical": tally.noise == 0,
    }


def optimized_figures(seen: Observations) -> dict[str, Any]:
    """The optimized session's own figures, and its distance to the graph as written."""
    facts = figures(seen, OPTIMIZED)
    kept = ("top1_agreement", "sqnr_db", "cosine", "max_abs_error", "metric", "flips")
    tally = seen.between[OPTIMIZED]
    return {k: facts[k] for k in kept} | {"to_as_written": facts_of(tally)}


def notes(entry: Mapping[str, Any]) -> list[str]:
    """What a reader must know to read the figures rightly."""
    found = []
    faster = entry["optimized"]
    if faster is not None and faster["sqnr_db"] < entry["sqnr_db"] - NOTABLE_DB:
        cause = (
            "this x86 has no VNNI: sums of two 8-bit products saturate at 16 bits; Arm and newer x86 do not"
            if not has_vnni()
            else "its fused kernels round elsewhere than the graph says"
        )
        found.append(
            f"ONNX Runtime's optimized session reaches {faster['sqnr_db']:.1f} dB, the graph as written "
            f"{entry['sqnr_db']:.1f} dB: {cause}"
        )
    if entry["metric"] is not None and not entry["metric"]["reference"] > 0:
        found.append(
            f"the float model itself has {entry['metric']['name']} {entry['metric']['reference']:.3g}: check "
            "labels and preprocessing before reading the rest"
        )
    return found


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """True unless this is an x86 that lacks the 8-bit dot product instructions."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return not flags or "avx512_vnni" in flags.split() or "avx_vnni" in flags.split()
