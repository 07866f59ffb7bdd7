"""Run the recipe of an earlier run again and say whether every artifact is the same, byte for byte."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgecomp import ledger, pipeline
from edgecomp.errors import InputError
from edgecomp.recipe import Document, Recipe


@dataclass(frozen=True)
class Earlier:
    """What an earlier run left: its ledger, and the hash of each artifact that is still there."""

    folder: Path
    facts: Mapping[str, Any]
    hashes: Mapping[str, str]


def earlier(folder: Path) -> Earlier:
    """Read DIR/ledger.json. Raises InputError when it is missing, damaged, or names no artifact."""
    path = folder / ledger.NAME
    try:
        facts = json.loads(path.read_text())
        hashes = {Path(a["path"]).name: str(a["manifest"]["sha256"]) for a in facts["artifacts"]}
    except OSError as error:
        raise InputError(f"no {ledger.NAME} in {folder}; give the folder of a finished run") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); run the recipe again") from error
    if not hashes:
        raise InputError(f"{path} names no artifact; there is nothing to rebuild")
    return Earlier(folder, facts, hashes)


def check(folder: Path) -> dict[str, Any]:
    """Rebuild in a temporary folder, without parity and profile, and compare.

    `artifacts[]`: `name`, `earlier`, `rebuilt` (SHA-256), `same`; `environment[]`: what differs in versions
    since; `passed`. Paths in the recipe are read from the current folder, as `edgecomp run` does.
    Raises InputError, and whatever the run raises.
    """
    before = earlier(folder)
    plain = {**before.facts["recipe"], "parity": False, "profile": None, "gates": []}
    document = Document(
        Recipe.model_validate(plain), plain, before.facts["recipe_sha256"], folder / "recipe.yaml"
    )
    threads = before.facts.get("environment", {}).get("threads")
    with tempfile.TemporaryDirectory() as temporary, torch_threads(threads):
        again = pipeline.run(document, Path(temporary))
        rebuilt = {Path(a["path"]).name: str(a["manifest"]["sha256"]) for a in again["artifacts"]}
    artifacts = [
        {"name": n, "earlier": h, "rebuilt": rebuilt.get(n), "same": rebuilt.get(n) == h}
        for n, h in before.hashes.items()
    ]
    return {
        "folder": str(folder),
        "artifacts": artifacts,
        "environment": changed(before.facts.get("environment", {}), ledger.environment()),
        "passed": all(a["same"] for a in artifacts),
    }


@contextmanager
def torch_threads(recorded: str | None) -> Iterator[None]:
    """As many threads as the earlier run was given: the order of float32 sums in training depends on it."""
    before = torch.get_num_threads()
    if recorded and recorded.isdigit():
        torch.set_num_threads(int(recorded))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each library, and for machine, system and threads, that is not what it was."""
    lines = [f"{k}: {then.get(k)} -> {now.get(k)}" for k in ("python", "machine", "cpu", "threads")]
    lines = [line for line in lines if line.split(": ")[1].split(" -> ")[0] != line.split(" -> ")[1]]
    old, new = then.get("versions", {}), now.get("versions", {})
    return lines + [f"{n}: {old.get(n)} -> {v}" for n, v in new.items() if old.get(n) != v]
