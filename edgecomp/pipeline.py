"""The whole chain: a recipe in; artifacts, ledger and report out. The one module that knows all of it."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from edgecomp import checkpoint, files, ledger, models, progress, registry, trial
from edgecomp import pipeline_export as exporting
from edgecomp import pipeline_steps as stepping
from edgecomp.compress import interim, parallel
from edgecomp.errors import (
    DeviceError,
    EdgecompError,
    GateFailed,
    InputError,
    MissingError,
    RecipeError,
)
from edgecomp.meter import Meter
from edgecomp.parity import gates as gating
from edgecomp.pipeline_data import open_roles
from edgecomp.pipeline_export import Candidates, Wanted
from edgecomp.pipeline_layers import layer_noise
from edgecomp.pipeline_steps import Evaluation
from edgecomp.recipe import Document, StepEntry
from edgecomp.spec import Candidate, Data, StepRecord

CHECKPOINTS = "checkpoints"
_FLOAT_STEPS = (
    "prune",
    "prune-magnitude",
    "prune-movement",
    "prune-iterative",
    "drop-layers",
    "prune-to-budget",
    "finetune",
    "distill",
    "distill-text",
)


@dataclass
class Run:
    """What a run holds while it goes: fixed inputs, candidates so far, the ledger on disk."""

    document: Document
    out: Path
    data: Data
    origin: checkpoint.Origin
    candidates: Candidates
    targets: tuple[Wanted, ...]
    devices: tuple[Any, ...]
    ledger: dict[str, Any]
    start: Evaluation = Evaluation(None, None)
    before: float | None = None
    resumed: int = 0
    resuming: bool = False
    save_every: float = interim.SECONDS
    layers: list[dict[str, Any]] | None = field(default=None)

    def save(self) -> None:
        if parallel.rank() == 0:
            ledger.save(self.ledger, self.out)


def run(
    document: Document, out: Path, *, resume: bool = False, save_every: float = interim.SECONDS
) -> dict[str, Any]:
    """Run a recipe into `out`; returns the ledger, whose `verdict.passed` is False when a gate failed.

    Everything is checked before the first step: targets, libraries, devices, data, the model, unsupported
    operations, the folder. `resume` goes on after the last finished step and artifact of an earlier run, and
    inside a step that was training; trainings keep themselves about every `save_every` seconds.
    Under `torchrun` all processes train together, and the first one exports and writes.
    Raises a branch of EdgecompError; whatever happens, files under their final names are complete.
    """
    parallel.start()
    state = prepared(document, out, resume)
    state.save_every = save_every
    stopped = None
    try:
        _steps(state)
        if parallel.rank() == 0:
            _artifacts(state)
    except GateFailed as error:
        stopped = str(error)
    if parallel.rank() == 0:
        _finish(state, stopped)
    parallel.wait()
    return state.ledger


def attribute(document: Document, out: Path) -> dict[str, Any]:
    """Re-run the chain of a finished run with each step left out, and say what each step cost.

    Adds `attribution[]` to the ledger (`step`, `metric`, `without`, `cost`: what the step takes from the
    metric, positive is worse; None where the chain cannot do without it) and writes the report again.
    """
    state = prepared(document, out, resume=True)
    entries = document.recipe.steps
    if _finished(state, entries) <= len(entries):
        raise InputError(f"the run in {out} is not finished; resume it first: --resume")
    whole = next(iter(state.ledger["steps"][-1]["metrics"].values()), None)
    rows = [_left_out(state, index, whole) for index in range(len(entries))]
    state.ledger["attribution"] = rows
    _finish(state, None)
    return state.ledger


def _left_out(state: Run, left_out: int, whole: float | None) -> dict[str, Any]:
    entries = state.document.recipe.steps
    progress.note(f"without step {left_out + 1}, {entries[left_out].name!r}")
    candidate = _before(state, left_out)
    row = {"step": entries[left_out].name, "metric": whole, "without": None, "cost": None, "reason": None}
    try:
        for entry in entries[left_out + 1 :]:
            torch.manual_seed(state.document.recipe.seed)
            candidate = entry.build(state.document.recipe.seed)(candidate, state.data)
        found = _evaluated(state, candidate)
    except EdgecompError as error:
        return {**row, "reason": str(error)}
    return {**row, "without": found.value, "cost": found.drop(whole)}


def _before(state: Run, index: int) -> Candidate:
    """The candidate that step `index` was given."""
    if index == 0:
        module = state.origin.load()
        return Candidate(module, state.candidates.floating.inputs, original=module)
    candidate, _ = checkpoint.load(_checkpoint(state, index))
    return candidate


def prepared(document: Document, out: Path, resume: bool) -> Run:
    """Check everything, load or open everything. Nothing is trained, exported or measured here."""
    recipe = document.recipe
    exporters = {e.target: exporting.make_exporter(e.target, e.settings) for e in recipe.exports}
    _check_libraries(document)
    files.check_writable(out)
    devices = tuple(exporting.open_devices(recipe.profile.devices if recipe.profile and exporters else ()))
    for device in devices:
        device.probe()
    stepping.metric_named(recipe.metric)
    data = open_roles(recipe.data)
    origin = checkpoint.Origin(recipe.model, recipe.weights)
    module = origin.load()
    inputs = models.input_specs(module, _evaluation(data))
    models.check_inputs(module, inputs)
    candidate = Candidate(module, inputs, original=module)
    targets = tuple(exporting.wanted(t, e, candidate) for t, e in exporters.items())
    _check_plan_targets(targets, candidate, data, recipe.steps)
    told = ledger.load(out, document.sha256) if resume else ledger.new(document.plain, document.sha256)
    start = Candidates(candidate)
    return Run(document, out, data, origin, start, targets, devices, told, resuming=resume)


def _check_libraries(document: Document) -> None:
    """Runtimes of the targets and the report's libraries. Raises MissingError."""
    recipe = document.recipe
    if recipe.parity:
        for each in recipe.exports:
            form = registry.format_of(each.target)
            if form in registry.names("runtimes"):
                registry.load("runtimes", form)
    try:
        importlib.import_module("edgecomp.report.page")
    except ModuleNotFoundError as error:
        raise MissingError(
            f"the report needs {error.name}, which is not installed: pip install 'edgecomp[report]'"
        ) from error


def _check_plan_targets(
    targets: Sequence[Wanted], candidate: Candidate, data: Data, steps: Sequence[StepEntry]
) -> None:
    """Targets that lower a plan: a step must make one, and every op must have an integer form."""
    needing = [t.target for t in targets if t.quantized]
    if needing and all(s.name in _FLOAT_STEPS for s in steps):
        raise RecipeError(
            f"target {needing[0]!r} needs a quantized model, and no step of the recipe quantizes; add "
            "`- quantize` as the last step"
        )
    for bits in {exporting.bits_for(t.target) for t in targets if t.quantized}:
        rough = exporting.rough_quantized(candidate, data, bits)
        for each in targets:
            if exporting.bits_for(each.target) == bits:
                exporting.check_quantized(each, rough)


def _evaluation(data: Data) -> Any:
    if data.evaluation is None:
        raise InputError("a run needs evaluation data: give the recipe `data: evaluation:`")
    return data.evaluation


def _steps(state: Run) -> None:
    """The float model, then every step of the recipe that is not done yet."""
    entries = state.document.recipe.steps
    done = _finished(state, entries)
    if not done:
        state.ledger["steps"], state.ledger["artifacts"] = [], []
        if not state.resuming:
            _forget(state, *(state.out / CHECKPOINTS).glob("*.training"))
        _measure_float(state)
    for index, entry in enumerate(entries):
        if index + 2 > done:
            _step(state, index, entry)


def _finished(state: Run, entries: Sequence[StepEntry]) -> int:
    """How many steps (the float model counted) an earlier run finished; takes its last candidates over."""
    rows = state.ledger["steps"]
    done = 0
    for index in range(min(len(rows), len(entries) + 1)):
        if index and not _checkpoint(state, index).is_file():
            break
        done = index + 1
    state.ledger["steps"] = rows[:done]
    if not done:
        return 0
    first = rows[0]
    name, value = next(iter(first["metrics"].items()), (None, None))
    metric = stepping.metric_named(name)
    state.start = Evaluation(name, value, metric.higher_is_better if metric else True)
    for index in range(1, done):
        candidate, _ = checkpoint.load(_checkpoint(state, index))
        state.candidates = state.candidates.after(replace(candidate, original=_original(state)))
    state.before = next(iter(rows[done - 1]["metrics"].values()), None)
    state.resumed = done
    progress.note(f"resuming after step {rows[done - 1]['name']!r}")
    return done


def _original(state: Run) -> Any:
    return exporting.reference_of(state.candidates)


def _checkpoint(state: Run, index: int) -> Path:
    entry = state.document.recipe.steps[index - 1]
    return state.out / CHECKPOINTS / f"{index:02d}-{re.sub(r'[^A-Za-z0-9_-]', '_', entry.name)}.pt"


def _measure_float(state: Run) -> None:
    with Meter() as meter:
        state.start = _evaluated(state, state.candidates.floating)
    state.before = state.start.value
    row = _row(
        state, "float", StepRecord("float", "float", {}), state.candidates.floating, state.start, meter
    )
    state.ledger["steps"].append(row)
    state.save()


def _evaluated(state: Run, candidate: Candidate) -> Evaluation:
    metric = stepping.metric_named(state.document.recipe.metric)
    result = stepping.evaluate(candidate, _evaluation(state.data), metric)
    if result.value is not None:
        progress.note(f"{result.name} {result.value:.4f}")
    return result


def _step(state: Run, index: int, entry: StepEntry) -> None:
    """Run one step, judge its gates, keep its checkpoint, write the ledger."""
    recipe = state.document.recipe
    step = entry.build(recipe.seed)
    progress.note(f"step {index + 1} of {len(recipe.steps)}: {entry.name}")
    torch.manual_seed(recipe.seed)
    before = state.candidates.last
    training = _checkpoint(state, index + 1).with_suffix(".training")
    with Meter() as meter, interim.within(training, state.save_every):
        candidate = step(before, state.data)
    found = _evaluated(state, candidate)
    row = _row(state, entry.name, candidate.history[-1], candidate, found, meter)
    drops = {"drop": state.start.drop(found.value), "drop_previous": _drop_previous(state, found)}
    row["gates"] = [*stepping.judge(entry.gates, row, drops), *_on_devices(state, entry, candidate)]
    row["passed"] = all(g["passed"] for g in row["gates"]) if row["gates"] else None
    row["rolled_back"] = row["passed"] is False and entry.on_failure == "rollback"
    if row["rolled_back"]:
        candidate = before
    else:
        state.before = found.value
    state.candidates = state.candidates.after(candidate)
    if parallel.rank() == 0:
        checkpoint.save(candidate, state.origin, _checkpoint(state, index + 1))
    parallel.wait()
    state.ledger["steps"].append(row)
    state.save()
    _forget(state, training)
    if row["passed"] is False and entry.on_failure == "stop":
        failed = next(g for g in row["gates"] if not g["passed"])
        raise GateFailed(f"step {entry.name!r} did not pass its gate {failed['expr']!r}: {failed['reason']}")


def _on_devices(state: Run, entry: StepEntry, candidate: Candidate) -> list[dict[str, Any]]:
    """A step's gates on latency and the like: the candidate as the first export would run, for trial."""
    gates = [g for g in gating.parse_all(entry.gates) if g.profiled]
    recipe = state.document.recipe
    if not gates or recipe.profile is None or parallel.rank() != 0:
        return []
    target = recipe.exports[0].target
    return trial.judge(gates, trial.profiles(candidate, state.data, target, state.devices, recipe.profile))


def _forget(state: Run, *folders: Path) -> None:
    """Remove what trainings kept, once their steps are finished or begun anew."""
    if parallel.rank() == 0:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    parallel.wait()


def _drop_previous(state: Run, found: Evaluation) -> float | None:
    return replace(found, value=state.before).drop(found.value)


def _row(
    state: Run, name: str, record: StepRecord, candidate: Candidate, found: Evaluation, meter: Meter
) -> dict[str, Any]:
    """One entry of the ledger's `steps`."""
    return {
        "name": name,
        "kind": record.kind,
        "settings": dict(record.settings),
        "notes": list(record.notes),
        "seconds": meter.seconds,
        "peak_rss_bytes": meter.peak_rss_bytes,
        **stepping.count(candidate),
        "metrics": found.metrics,
        "delta_vs_float": _delta(found, state.start.value),
        "delta_vs_previous": _delta(found, state.before),
        "gates": [],
        "passed": None,
        "rolled_back": False,
    }


def _delta(found: Evaluation, before: float | None) -> dict[str, float]:
    return {} if before is None else {name: now - before for name, now in found.metrics.items()}


def _artifacts(state: Run) -> None:
    """Export, compare and profile every target that an earlier run has not finished."""
    finished = {a["manifest"]["target"]: a for a in state.ledger["artifacts"] if _complete(state, a)}
    state.ledger["artifacts"] = list(finished.values())
    for each in state.targets:
        if each.target not in finished:
            state.ledger["artifacts"].append(_artifact(state, each))
            state.save()


def _complete(state: Run, entry: Mapping[str, Any]) -> bool:
    path = state.out / entry["path"]
    return path.exists() and files.sha256(path) == entry["manifest"]["sha256"]


def _artifact(state: Run, each: Wanted) -> dict[str, Any]:
    recipe, source = state.document.recipe, _evaluation(state.data)
    artifact = exporting.export(
        each, state.candidates, state.data, state.out, recipe_sha256=state.document.sha256
    )
    compared = None
    if recipe.parity:
        metric = stepping.metric_named(recipe.metric)
        gates = [g for g in recipe.gates_of(each.target) if not gating.parse(g).profiled]
        layers = (lambda: _layers(state)) if each.quantized else None
        compared = exporting.parity(artifact, state.candidates, source, metric, gates, layers)
    measured = []
    if recipe.profile is not None:
        for device in state.devices:
            measured += _profiled(state, artifact.path, device)
    timed = [g for g in gating.parse_all(recipe.gates_of(each.target)) if g.profiled]
    return {
        "path": artifact.path.relative_to(state.out).as_posix(),
        "manifest": exporting.manifest.to_json(artifact),
        "parity": compared,
        "profiles": measured,
        "gates": trial.judge(timed, measured),
    }


def _layers(state: Run) -> list[dict[str, Any]]:
    """Per-layer noise, worked out once for all targets that share the plan."""
    if state.layers is None:
        state.layers = layer_noise(state.candidates.last, _evaluation(state.data))
    return state.layers


def _profiled(state: Run, path: Path, device: Any) -> list[dict[str, Any]]:
    """A device that fails is named in the ledger's warnings; the other devices and targets go on."""
    entry = state.document.recipe.profile
    try:
        return exporting.profiles(path, [device], entry) if entry else []
    except DeviceError as error:
        progress.note(f"{device.name}: {error}")
        state.ledger["warnings"].append(f"{path.name} not profiled on {device.name}: {error}")
        return []


def _finish(state: Run, stopped: str | None) -> None:
    """The verdict, the report, and the ledger for the last time."""
    report = importlib.import_module("edgecomp.report.page")
    state.ledger["verdict"] = _verdict(state.ledger, stopped)
    state.save()
    report.write(state.ledger, state.out)
    for device in state.devices:
        if hasattr(device, "close"):
            device.close()


def _verdict(facts: Mapping[str, Any], stopped: str | None) -> dict[str, Any]:
    """`passed`: None without any gate; `text`: one sentence."""
    gates = [(s["name"], g) for s in facts["steps"] if not s["rolled_back"] for g in s["gates"]]
    for artifact in facts["artifacts"]:
        found = [*(artifact["parity"] or {}).get("gates", []), *artifact.get("gates", [])]
        gates += [(artifact["manifest"]["target"], g) for g in found]
    failed = [f"{where}: {g['reason']}" for where, g in gates if not g["passed"]]
    if stopped is not None:
        return {"passed": False, "text": stopped}
    if failed:
        return {"passed": False, "text": f"{len(failed)} of {len(gates)} gates failed; {failed[0]}"}
    if not gates:
        return {"passed": None, "text": "No gate was asked for; the figures are what was measured."}
    return {"passed": True, "text": f"All {len(gates)} gates hold."}
