"""Searching over a recipe: which settings give the best metric for how many bytes and milliseconds."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from edgecomp import files, pipeline, progress
from edgecomp.errors import EdgecompError, RecipeError
from edgecomp.pipeline_steps import metric_named
from edgecomp.recipe import Document, SearchEntry, validated

_DIRECTION = {
    "metric": StudyDirection.MAXIMIZE,
    "size_bytes": StudyDirection.MINIMIZE,
    "latency_ms": StudyDirection.MINIMIZE,
    "macs": StudyDirection.MINIMIZE,
}


def search(
    document: Document, out: Path, trials: int | None = None, storage: str | None = None
) -> dict[str, Any]:
    """Run the recipe's `search`: trials until their number is reached, earlier ones counted.

    Each trial is a run of its own in `out/trials/NNN`. The study lies in `storage` (an SQLAlchemy URL; SQLite
    in `out` without it), so a search goes on where it was stopped, and several machines may share one.
    Returns and writes `search.json`: `objectives`, `trials[]`, `pareto[]` (numbers of trials that no other
    beats in everything), and writes `search.html`, where the front is drawn. Raises RecipeError without a
    `search` section or for a path that the recipe lacks.
    """
    entry = document.recipe.search
    if entry is None:
        raise RecipeError(f"{document.path} has no `search:` section; see docs/recipes.md")
    _check_paths(document, entry)
    files.check_writable(out)
    study = optuna.create_study(
        study_name=document.sha256,
        storage=storage or f"sqlite:///{(out / 'search.db').resolve()}",
        directions=[_direction(o, document.recipe.metric) for o in entry.objectives],
        sampler=optuna.samplers.TPESampler(seed=document.recipe.seed),
        load_if_exists=True,
    )
    wanted = trials if trials is not None else entry.trials
    while len(_finished(study.trials)) < wanted:
        _one(study, document, entry, out)
    result = _result(study, entry)
    with files.atomic(out / "search.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    importlib.import_module("edgecomp.report.search_page").write(
        result, document.recipe.name or "search", out
    )
    return result


def _direction(objective: str, metric: str | None) -> StudyDirection:
    """A metric named in the recipe may be an error, better small; an unnamed one counts as a gain."""
    named = metric_named(metric)
    if objective == "metric" and named is not None and not named.higher_is_better:
        return StudyDirection.MINIMIZE
    return _DIRECTION[objective]


def _one(study: optuna.Study, document: Document, entry: SearchEntry, out: Path) -> None:
    """One trial. A run that fails is recorded as failed with its reason, and the search goes on."""
    trial = study.ask()
    plain = suggested(document.plain, entry, trial)
    progress.note(f"trial {trial.number}: {trial.params}")
    try:
        recipe = validated(plain, document.path)
        folder = out / "trials" / f"{trial.number:03d}"
        facts = pipeline.run(replace(document, recipe=recipe, plain=plain), folder)
        values = [_objective(name, facts) for name in entry.objectives]
    except EdgecompError as error:
        trial.set_user_attr("reason", str(error))
        study.tell(trial, state=TrialState.FAIL)
        return
    study.tell(trial, values)


def suggested(plain: Mapping[str, Any], entry: SearchEntry, trial: Trial) -> dict[str, Any]:
    """The recipe's plain data with this trial's values in it, and without its `search` section."""
    result: dict[str, Any] = copy.deepcopy(dict(plain))
    del result["search"]
    left_out = []
    for path, space in entry.space.items():
        if space == "optional":
            if not trial.suggest_categorical(path, [True, False]):
                left_out.append(int(path.partition(".")[2]))
            continue
        _put(result, path.split("."), _suggest(trial, path, space))
    steps = [_named(s) for s in result.get("steps", [])]
    result["steps"] = [s for i, s in enumerate(steps) if i not in left_out]
    return result


def _suggest(trial: Trial, path: str, space: Any) -> Any:
    if isinstance(space, Mapping):
        return trial.suggest_categorical(path, list(space["choice"]))
    low, high = space
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(path, low, high)
    return trial.suggest_float(path, float(low), float(high))


def _put(plain: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """`steps.0.macs` sets that setting of the first step, whatever its name."""
    index = int(path[1])
    step = _named(plain["steps"][index])
    plain["steps"][index] = step
    name = next(k for k in step if k not in ("gates", "on_failure"))
    step[name] = {**(step[name] or {}), path[2]: value}


def _named(step: Any) -> dict[str, Any]:
    return {step: {}} if isinstance(step, str) else dict(step)


def _check_paths(document: Document, entry: SearchEntry) -> None:
    count = len(document.recipe.steps)
    for path, space in entry.space.items():
        parts = path.split(".")
        good = parts[0] == "steps" and len(parts) > 1 and parts[1].isdigit() and int(parts[1]) < count
        if not good or len(parts) != (2 if space == "optional" else 3):
            raise RecipeError(
                f"search.space names {path!r}; expected steps.N.SETTING with N below {count}, or "
                "steps.N: optional"
            )
    if "latency_ms" in entry.objectives and document.recipe.profile is None:
        raise RecipeError("search.objectives has latency_ms, but the recipe's profile is null")


def _objective(name: str, facts: Mapping[str, Any]) -> float:
    """Of the last step and the first artifact. Raises RecipeError when it was not measured."""
    last, artifacts = facts["steps"][-1], facts["artifacts"]
    value: float | None = None
    if name == "macs":
        value = last["macs"]
    elif name == "metric":
        told = (artifacts[0]["parity"] or {}).get("metric") if artifacts else None
        value = told["artifact"] if told else next(iter(last["metrics"].values()), None)
    elif name == "size_bytes":
        value = artifacts[0]["manifest"]["size_bytes"] if artifacts else last["size_bytes"]
    elif artifacts and artifacts[0]["profiles"]:
        value = (artifacts[0]["profiles"][0]["latency_ms"] or {}).get("p50")
    if value is None:
        raise RecipeError(f"objective {name!r} was not measured; give it what it needs, or leave it out")
    return float(value)


def _finished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [t for t in trials if t.state.is_finished()]


def _result(study: optuna.Study, entry: SearchEntry) -> dict[str, Any]:
    rows = []
    for trial in _finished(study.trials):
        values = dict(zip(entry.objectives, trial.values, strict=True)) if trial.values else None
        rows.append(
            {
                "number": trial.number,
                "params": trial.params,
                "values": values,
                "reason": trial.user_attrs.get("reason"),
            }
        )
    best = [t.number for t in study.best_trials] if any(r["values"] for r in rows) else []
    return {"objectives": list(entry.objectives), "trials": rows, "pareto": sorted(best)}
