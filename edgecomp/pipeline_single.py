"""What the single commands do: one step alone, or one model to several targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from edgecomp import checkpoint, files, manifest, models, progress, registry
from edgecomp import pipeline_export as exporting
from edgecomp import pipeline_steps as stepping
from edgecomp.errors import InputError, ModelError, RecipeError
from edgecomp.loading import open_data
from edgecomp.meter import Meter
from edgecomp.pipeline_export import Candidates, Wanted
from edgecomp.recipe import with_settings
from edgecomp.spec import Candidate, Data, DataSource, Preprocessing, TensorSpec


@dataclass(frozen=True)
class Sources:
    """Data SRC arguments of a command; `preprocessing` is a YAML or JSON file for folders of pictures."""

    train: str | None = None
    calibration: str | None = None
    evaluation: str | None = None
    preprocessing: Path | None = None

    def open(self) -> Data:
        """Raises DataError when a source is missing, empty or unfit."""
        decided = read_preprocessing(self.preprocessing) if self.preprocessing else None
        evaluation = open_data(self.evaluation, decided) if self.evaluation else None
        labels = (evaluation.labels or None) if evaluation else None
        train = open_data(self.train, decided, labels) if self.train else None
        calibration = open_data(self.calibration, decided, labels) if self.calibration else None
        return Data(train, calibration, evaluation)


@dataclass(frozen=True)
class Model:
    """A MODEL argument: its spec or a checkpoint, a weights file, and input shapes where no data tells."""

    spec: str
    weights: Path | None = None
    input_shapes: tuple[tuple[int, ...], ...] = ()

    def load(self, data: Data) -> tuple[Candidate, checkpoint.Origin]:
        """The candidate that work starts from. Raises ModelError."""
        if self.spec.endswith((".pt", ".pth")):
            if self.weights is not None:
                raise InputError(f"--weights {self.weights} does not go with the checkpoint {self.spec}")
            return checkpoint.load(Path(self.spec))
        origin = checkpoint.Origin(self.spec, self.weights)
        module = origin.load()
        inputs = self._inputs(module, data)
        models.check_inputs(module, inputs)
        return Candidate(module, inputs, original=module), origin

    def _inputs(self, module: torch.nn.Module, data: Data) -> tuple[TensorSpec, ...]:
        source = data.evaluation or data.calibration or data.train
        if source is not None:
            return models.input_specs(module, source)
        if not self.input_shapes:
            raise ModelError(
                f"the input shape of {self.spec!r} is unknown; give data (--data or --calib), or "
                "--input-shape 1,3,224,224"
            )
        zeros = tuple(np.zeros(shape, np.float32) for shape in self.input_shapes)
        return models.specs_of(module, zeros)


def read_preprocessing(path: Path) -> Preprocessing:
    """A Preprocessing from a YAML or JSON file of its fields. Raises InputError."""
    try:
        facts = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--preprocessing {path} cannot be read: {error}") from error
    if not isinstance(facts, dict):
        raise InputError(f"--preprocessing {path} holds no keys; expected such as size: [224, 224]")
    result: Preprocessing = with_settings(Preprocessing, facts, f"--preprocessing {path}")
    return result


def one_step(
    name: str,
    settings: Mapping[str, Any],
    model: Model,
    sources: Sources,
    out: Path,
    teacher: str | None = None,
) -> dict[str, Any]:
    """Run one step and write a checkpoint; returns what it changed, evaluated where there is data.

    Keys: `step`, `settings`, `notes`, `seconds`, `peak_rss_bytes`, `before`, `after` (params, macs,
    size_bytes, metrics), `checkpoint`. Raises a branch of EdgecompError.
    """
    step = with_settings(registry.load("steps", name), settings, f"step {name!r}")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; expected the name of a checkpoint file, such as model.pt")
    files.check_writable(out.parent)
    data = sources.open()
    candidate, origin = model.load(data)
    if teacher is not None:
        candidate = replace(candidate, original=models.load_model(teacher))
    before = _facts(candidate, data)
    progress.note(f"running {name}")
    with Meter() as meter:
        result = step(candidate, data)
    checkpoint.save(result, origin, out)
    record = result.history[-1]
    return {
        "step": name,
        "settings": dict(record.settings),
        "notes": list(record.notes),
        "seconds": meter.seconds,
        "peak_rss_bytes": meter.peak_rss_bytes,
        "before": before,
        "after": _facts(result, data),
        "checkpoint": str(out),
    }


def _facts(candidate: Candidate, data: Data) -> dict[str, Any]:
    found = stepping.evaluate(candidate, data.evaluation, None).metrics if data.evaluation else {}
    return {**stepping.count(candidate), "metrics": found}


def export_model(
    model: Model,
    targets: Sequence[str],
    sources: Sources,
    out: Path,
    *,
    quantize: Mapping[str, Any] | None = None,
    exporter_settings: Mapping[str, Mapping[str, Any]] | None = None,
    gates: Sequence[str] = (),
    check_parity: bool = True,
) -> dict[str, Any]:
    """Export one model to each target; quantized once for those that need it, with calibration data.

    Returns `artifacts[]` (`path`, `manifest`, `parity`) and `passed` (None without gates). Parity needs
    evaluation or calibration data; without any it is skipped. Raises a branch of EdgecompError before any
    work where it can.
    """
    told = exporter_settings or {}
    exporters = {t: exporting.make_exporter(t, told.get(t, {})) for t in dict.fromkeys(targets)}
    if not exporters:
        raise InputError("no target given; give --target, for example --target tflite-int8")
    _check_runtimes(exporters, check_parity)
    files.check_writable(out)
    data = sources.open()
    if data.calibration is None:
        data = replace(data, calibration=data.evaluation)
    candidate, _ = model.load(data)
    chosen = [_wanted(t, e, candidate) for t, e in exporters.items()]
    by_bits = _quantized(chosen, candidate, data, quantize or {})
    source = data.evaluation or data.calibration
    entries = []
    for each in chosen:
        candidates = Candidates(candidate, by_bits.get(exporting.bits_for(each.target)))
        entries.append(_exported(each, candidates, data, out, source if check_parity else None, gates))
    judged = [g for e in entries for g in (e["parity"] or {}).get("gates", [])]
    return {"artifacts": entries, "passed": all(g["passed"] for g in judged) if judged else None}


def _check_runtimes(exporters: Mapping[str, Any], check_parity: bool) -> None:
    if check_parity:
        for target in exporters:
            if registry.format_of(target) in registry.names("runtimes"):
                registry.load("runtimes", registry.format_of(target))


def _wanted(target: str, exporter: Any, candidate: Candidate) -> Wanted:
    """A checkpoint that is quantized already is asked as it is; a float one may be quantized later."""
    if candidate.quantization is None:
        return exporting.wanted(target, exporter, candidate)
    found = exporter.problems(candidate)
    if found:
        raise RecipeError(exporting.unsupported(target, found))
    return Wanted(target, exporter, quantized=True)


def _quantized(
    chosen: Sequence[Wanted], candidate: Candidate, data: Data, settings: Mapping[str, Any]
) -> dict[int, Candidate]:
    """Activation bits -> a candidate with a plan, for the targets that lower one."""
    if candidate.quantization is not None:
        return dict.fromkeys((8, 16), candidate)
    needed = [t for t in chosen if t.quantized]
    if needed and data.calibration is None and data.train is None:
        raise InputError(
            f"target {needed[0].target!r} needs calibration data to choose its scales; give --calib SRC, a "
            "hundred typical samples or more"
        )
    found: dict[int, Candidate] = {}
    for bits in sorted({exporting.bits_for(t.target) for t in needed}):
        rough = exporting.rough_quantized(candidate, data, bits)
        for each in needed:
            if exporting.bits_for(each.target) == bits:
                exporting.check_quantized(each, rough)
        step = with_settings(
            registry.load("steps", "quantize"), {"activation_bits": bits, **settings}, "step 'quantize'"
        )
        progress.note(f"quantizing with {bits}-bit activations")
        found[bits] = step(candidate, data)
    return found


def _exported(
    each: Wanted,
    candidates: Candidates,
    data: Data,
    out: Path,
    source: DataSource | None,
    gates: Sequence[str],
) -> dict[str, Any]:
    artifact = exporting.export(each, candidates, data, out)
    compared = exporting.parity(artifact, candidates, source, None, gates) if source else None
    return {"path": str(artifact.path), "manifest": manifest.to_json(artifact), "parity": compared}
