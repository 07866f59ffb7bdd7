"""The corruption ladder: how the metric falls with severity, float model beside artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgecomp import registry
from edgecomp.errors import DataError, UnknownNameError
from edgecomp.parity import metric as tasks
from edgecomp.parity.changed import ChangedSource
from edgecomp.parity.observe import Reference, observe
from edgecomp.spec import Batch, DataSource, Session

# Corrupted samples for each kind and severity, unless the caller says otherwise.
SAMPLES = 512
SEVERITIES = (1, 3, 5)
OUT_OF_RANGE = "out_of_range"

Change = Callable[[np.ndarray, int], np.ndarray]


def changed(source: DataSource, change: Change) -> ChangedSource:
    """A source whose first input is changed sample by sample: `change(sample, number) -> sample`."""

    def of_batch(batch: Batch, first: int) -> np.ndarray:
        return np.stack([change(sample, first + i) for i, sample in enumerate(batch.inputs[0])])

    return ChangedSource(source, of_batch)


def corrupted(source: DataSource, name: str, severity: int, *, seed: int = 0) -> ChangedSource:
    """The source under one corruption. The same seed gives the same noise to every model."""
    if name == OUT_OF_RANGE:
        return changed(source, lambda sample, i: (sample * (1 + severity)).astype(sample.dtype))
    how = source.preprocessing
    maker = maker_for(source, name)
    if getattr(maker, "of_text", False):
        return retyped(source, lambda text, n: maker.change(text, severity, _rng(seed, severity, n)))

    def change(sample: np.ndarray, number: int) -> np.ndarray:
        result: np.ndarray = maker(sample, how, name, severity, _rng(seed, severity, number))
        return result

    return changed(source, change)


def _rng(seed: int, severity: int, number: int) -> np.random.Generator:
    return np.random.default_rng((seed, severity, number))


def retyped(source: DataSource, change: Callable[[str, int], str]) -> ChangedSource:
    """A source whose texts are changed and encoded again: `change(text, number) -> text`.

    The source has `encode(text) -> array` of one sample's first input, and rows with the key `text`.
    Raises DataError when it has not.
    """
    encode = getattr(source, "encode", None)
    if encode is None:
        raise DataError(
            "typos need texts: the data source has no method encode(text), which gives the tokens"
        )

    def of_batch(batch: Batch, first: int) -> np.ndarray:
        if len(batch.rows) != len(batch) or not all("text" in row for row in batch.rows):
            raise DataError("typos need texts: the samples' rows have no key 'text'")
        texts = [change(str(row["text"]), first + i) for i, row in enumerate(batch.rows)]
        tokens = [np.asarray(encode(text), dtype=batch.inputs[0].dtype) for text in texts]
        if any(t.shape != batch.inputs[0].shape[1:] for t in tokens):
            raise DataError(
                f"encode gives tokens of shape {tokens[0].shape}, the data has {batch.inputs[0].shape[1:]}: "
                "cut and pad to the same length"
            )
        return np.stack(tokens)

    return ChangedSource(source, of_batch)


def check(source: DataSource, name: str) -> None:
    """Fail before any work when a corruption is unknown or does not apply to the data."""
    if name != OUT_OF_RANGE and getattr(maker_for(source, name), "of_text", False):
        next(iter(retyped(source, lambda text, _: text).batches(1)))


def maker_for(source: DataSource, name: str) -> Any:
    """The registered maker of a corruption that accepts this data. Raises UnknownNameError, DataError."""
    makers = [registry.load("corruptions", n)() for n in registry.names("corruptions")]
    known = {name for m in makers for name in m.names}
    if name not in known:
        raise UnknownNameError("corruption", name, {*known, OUT_OF_RANGE})
    sample = next(iter(source.batches(1))).inputs[0][0]
    for maker in makers:
        if name in maker.names and maker.accepts(sample, source.preprocessing):
            return maker
    raise DataError(
        f"corruption {name!r} does not apply: the data is of shape {sample.shape} with preprocessing "
        f"{source.preprocessing}; pictures and sounds need a preprocessing to be undone"
    )


def names_for(source: DataSource) -> list[str]:
    """All corruptions that apply to a source."""
    sample = next(iter(source.batches(1))).inputs[0][0]
    makers = [registry.load("corruptions", n)() for n in registry.names("corruptions")]
    usable = [m for m in makers if m.accepts(sample, source.preprocessing)]
    usable = [m for m in usable if not getattr(m, "of_text", False) or hasattr(source, "encode")]
    fitting = [n for m in usable for n in m.names]
    return fitting if sample.dtype.kind in "iu" else [*fitting, OUT_OF_RANGE]


def ladder(
    reference: Reference,
    session: Session,
    source: DataSource,
    names: Sequence[str],
    *,
    severities: Sequence[int] = SEVERITIES,
    samples: int = SAMPLES,
    metric: tasks.Metric | None = None,
    more: Mapping[str, DataSource] | None = None,
) -> list[dict[str, Any]]:
    """One row for each corruption and severity: metric of both, loss against clean, agreement.

    `more`: further changed sources by name (FGSM), severity 0. The metric is None without targets.
    """
    clean = row(reference, session, source, "clean", 0, samples, metric)
    rows = [
        row(reference, session, corrupted(source, n, s), n, s, samples, metric)
        for n in names
        for s in severities
    ]
    rows += [row(reference, session, s, n, 0, samples, metric) for n, s in (more or {}).items()]
    for entry in rows:
        entry["reference_loss"] = _difference(clean["reference"], entry["reference"])
        entry["artifact_loss"] = _difference(clean["artifact"], entry["artifact"])
        entry["excess_loss"] = _difference(entry["artifact_loss"], entry["reference_loss"])
    return rows


def row(
    reference: Reference,
    session: Session,
    source: DataSource,
    name: str,
    severity: int,
    samples: int,
    metric: tasks.Metric | None,
) -> dict[str, Any]:
    seen = observe(reference, {"test": session}, source, metric=metric, limit=samples)
    measured = seen.measured("test")
    predicted = seen.reference.joined("predicted"), seen.tests["test"].joined("predicted")
    agreement = None
    if predicted[0] is not None and predicted[1] is not None:
        agreement = float(np.mean(predicted[0] == predicted[1]))
    return {
        "name": name,
        "severity": severity,
        "samples": seen.samples,
        "metric": measured[0].name if measured else None,
        "reference": measured[0].value(measured[1]) if measured else None,
        "artifact": measured[0].value(measured[2]) if measured else None,
        "top1_agreement": agreement,
        "sqnr_db": min(t.sqnr_db for t in seen.outputs["test"]),
    }


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
