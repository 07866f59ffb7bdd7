"""From the ledger to what the page shows. Nothing here fails on a key that is not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from markupsafe import Markup

from edgecomp.report import charts, figures, tables
from edgecomp.report.figures import at
from edgecomp.report.tables import Table


@dataclass(frozen=True)
class Verdict:
    """`passed` None: no gate was asked for. `reasons`: what failed."""

    passed: bool | None
    text: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tile:
    """One figure of the headline."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Layers:
    """A picture of the noise by layer, shared by the artifacts in `names`."""

    names: tuple[str, ...]
    picture: Markup | None
    note: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Detail:
    """What was measured of one artifact."""

    name: str
    profiles: tuple[Profile, ...]


@dataclass(frozen=True)
class Profile:
    """One artifact on one device. `figures` None: nothing was measured there, `warnings` say why."""

    title: str
    figures: Table | None
    picture: Markup | None
    slowest: Table
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """Everything that both templates need."""

    title: str
    verdict: Verdict
    tiles: tuple[Tile, ...]
    steps: Table
    notes: tuple[tuple[str, tuple[str, ...]], ...]
    artifacts: Table
    attribution: Table
    gates: Table
    trade: Markup | None
    trade_lacks: tuple[str, ...]
    shrinking: Markup | None
    layers: tuple[Layers, ...]
    details: tuple[Detail, ...]
    warnings: tuple[str, ...]
    left_out: Table
    environment: tuple[tuple[str, str], ...]
    recipe: str
    recipe_sha256: str
    command: str


def view(ledger: Mapping[str, Any]) -> View:
    """Everything that the page shows of a ledger (keys: docs/contract.md)."""
    steps, artifacts = ledger.get("steps") or [], ledger.get("artifacts") or []
    float_bytes = at(steps[0], "size_bytes") if steps else None
    return View(
        title=str(at(ledger, "recipe", "name") or "compression"),
        verdict=verdict(ledger),
        tiles=tiles(ledger),
        steps=tables.steps(steps),
        notes=tuple((str(s.get("name")), tuple(map(str, s["notes"]))) for s in steps if s.get("notes")),
        artifacts=tables.artifacts(artifacts, float_bytes),
        attribution=tables.attribution(ledger),
        gates=tables.gates(ledger),
        trade=charts.trade(artifacts),
        trade_lacks=charts.not_in_trade(artifacts),
        shrinking=charts.shrinking(ledger),
        layers=layers(artifacts),
        details=tuple(
            Detail(tables.name_of(a), tuple(_profile(p) for p in a.get("profiles") or [])) for a in artifacts
        ),
        warnings=warnings(ledger),
        left_out=tables.left_out(artifacts),
        environment=environment(ledger),
        recipe=_yaml(ledger.get("recipe")),
        recipe_sha256=str(ledger.get("recipe_sha256") or ""),
        command="edgecomp run recipe.yaml --out DIR",
    )


def verdict(ledger: Mapping[str, Any]) -> Verdict:
    """The ledger's own verdict (a text, or `passed` and `text`), and the gates that failed."""
    told = ledger.get("verdict")
    steps = [s for s in ledger.get("steps") or [] if not s.get("rolled_back")]
    found = [
        (tables.name_of(a), g)
        for a in ledger.get("artifacts") or []
        for g in [*(at(a, "parity", "gates") or []), *(a.get("gates") or [])]
    ]
    found += [(str(s.get("name")), g) for s in steps for g in s.get("gates") or []]
    failed = tuple(
        f"{where}: {g.get('reason') or g.get('expr')}" for where, g in found if g.get("passed") is False
    )
    broken = [str(s.get("name")) for s in steps if s.get("passed") is False]
    passed = at(told, "passed")
    if passed is None:
        passed = False if failed or broken else True if found else None
    text = told if isinstance(told, str) else at(told, "text")
    return Verdict(passed, str(text or _counted(len(found), len(failed), broken)), failed)


def _counted(gates: int, failed: int, broken: list[str]) -> str:
    if broken:
        return f"Step {', '.join(broken)} did not pass its gate."
    if not gates:
        return "No gate was asked for; the figures below are what was measured."
    if failed:
        return f"{failed} of {gates} gates do not hold."
    return "The gate holds." if gates == 1 else f"All {gates} gates hold."


def tiles(ledger: Mapping[str, Any]) -> tuple[Tile, ...]:
    """Best size, largest loss, fastest median, lowest agreement: the four that people ask for first."""
    artifacts = ledger.get("artifacts") or []
    steps = ledger.get("steps") or []
    found = [
        _smallest(artifacts, at(steps[0], "size_bytes") if steps else None),
        _worst_change(artifacts),
        _fastest(artifacts),
        _agreement(artifacts),
    ]
    return tuple(tile for tile in found if tile)


def _smallest(artifacts: list[Mapping[str, Any]], whole: float | None) -> Tile | None:
    sized = [(size, tables.name_of(a)) for a in artifacts if (size := tables.size_of(a))]
    if not sized:
        return None
    size, name = min(sized)
    ratio = figures.times(whole, size)
    told = name if ratio == figures.MISSING else f"{name}, {ratio} smaller than the float model"
    return Tile("smallest file", figures.size(size), told)


def _worst_change(artifacts: list[Mapping[str, Any]]) -> Tile | None:
    found = [(at(a, "parity", "metric", "delta"), a) for a in artifacts]
    known = [(delta, a) for delta, a in found if delta is not None]
    if not known:
        return None
    better_high = at(known[0][1], "parity", "metric", "higher_is_better") is not False
    delta, artifact = (min if better_high else max)(known, key=lambda pair: pair[0])
    name = str(at(artifact, "parity", "metric", "name"))
    return Tile(f"largest loss of {name}", figures.change(name, delta), tables.name_of(artifact))


def _fastest(artifacts: list[Mapping[str, Any]]) -> Tile | None:
    found = [
        (median, f"{tables.name_of(a)} on {at(p, 'device', 'name')}")
        for a in artifacts
        for p in a.get("profiles") or []
        if (median := at(p, "latency_ms", "p50")) is not None
    ]
    return Tile("fastest median", figures.milliseconds(min(found)[0]), min(found)[1]) if found else None


def _agreement(artifacts: list[Mapping[str, Any]]) -> Tile | None:
    found = [
        (share, tables.name_of(a))
        for a in artifacts
        if (share := at(a, "parity", "top1_agreement")) is not None
    ]
    if not found:
        return None
    return Tile("lowest top-1 agreement", figures.metric("agreement", min(found)[0]), min(found)[1])


def layers(artifacts: list[Mapping[str, Any]]) -> tuple[Layers, ...]:
    """One picture for each set of figures; artifacts of one quantization plan share it."""
    sharing: list[tuple[list[Mapping[str, Any]], list[str]]] = []
    for artifact in artifacts:
        rows = at(artifact, "parity", "layers") or []
        names = next((names for known, names in sharing if known == rows), None)
        if names is None:
            sharing.append((rows, [tables.name_of(artifact)]))
        else:
            names.append(tables.name_of(artifact))
    return tuple(_layers(rows, names) for rows, names in sharing)


def _layers(rows: list[Mapping[str, Any]], names: list[str]) -> Layers:
    picture, note = charts.layers(rows)
    kinds = tuple(sorted({str(r.get("kind")) for r in rows if r.get("kind")}))
    return Layers(tuple(names), picture, note, kinds)


def _profile(facts: Mapping[str, Any]) -> Profile:
    return Profile(
        title=_where(facts.get("device") or {}, facts.get("runtime") or {}),
        figures=tables.latency(facts) if facts.get("latency_ms") or facts.get("instructions") else None,
        picture=charts.latencies(facts),
        slowest=tables.slowest(facts),
        warnings=tuple(str(w) for w in facts.get("warnings") or []),
    )


def _where(device: Mapping[str, Any], runtime: Mapping[str, Any]) -> str:
    """`pi5 (Raspberry Pi 5, Debian 12, governor performance), ai-edge-litert 2.3.0`."""
    governor = device.get("governor")
    words = [device.get("model"), device.get("os"), f"governor {governor}" if governor else None]
    about = ", ".join(str(w) for w in words if w)
    opened = " ".join(str(w) for w in (runtime.get("name"), runtime.get("version")) if w)
    name = str(device.get("name") or "device")
    return name + (f" ({about})" if about else "") + (f", {opened}" if opened else "")


def warnings(ledger: Mapping[str, Any]) -> tuple[str, ...]:
    """Warnings of the run and of profiles, notes of parity: each once, with all that it concerns."""
    concerned: dict[str, list[str]] = {str(w): [] for w in ledger.get("warnings") or []}
    for artifact in ledger.get("artifacts") or []:
        name = tables.name_of(artifact)
        for note in at(artifact, "parity", "notes") or []:
            concerned.setdefault(str(note), []).append(name)
        for profile in artifact.get("profiles") or []:
            where = f"{name} on {at(profile, 'device', 'name') or 'device'}"
            for warning in profile.get("warnings") or []:
                concerned.setdefault(str(warning), []).append(where)
    return tuple(f"{', '.join(names)}: {text}" if names else text for text, names in concerned.items())


def environment(ledger: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The environment's facts, nested ones flattened: `versions` -> `torch 2.13.0, numpy 2.4.6`."""
    facts = ledger.get("environment")
    if not isinstance(facts, Mapping):
        return ()
    return tuple((str(key).replace("_", " "), _flat(value)) for key, value in facts.items())


def _flat(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_flat(v) for v in value)
    return str(value)


def _yaml(recipe: Any) -> str:
    if isinstance(recipe, str) or recipe is None:
        return recipe or ""
    plain = json.loads(json.dumps(recipe, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
