"""The ledger of a run: what was done, what it cost, what came out. Keys: docs/contract.md."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from edgecomp import files
from edgecomp.errors import InputError, RecipeError

NAME = "ledger.json"
_LIBRARIES = (
    "edgecomp",
    "torch",
    "numpy",
    "ai-edge-litert",
    "flatbuffers",
    "onnx",
    "onnxruntime",
    "coremltools",
)


def new(recipe: Mapping[str, Any], recipe_sha256: str) -> dict[str, Any]:
    """An empty ledger of this recipe on this machine."""
    return {
        "recipe": dict(recipe),
        "recipe_sha256": recipe_sha256,
        "environment": environment(),
        "steps": [],
        "artifacts": [],
        "warnings": [],
        "verdict": None,
    }


def environment() -> dict[str, Any]:
    """Machine, system, Python, threads, and versions of the libraries that a result depends on."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": versions,
    }


def save(ledger: Mapping[str, Any], folder: Path) -> Path:
    """Write `ledger.json` atomically. NaN and infinities, which JSON lacks, become null."""
    final = folder / NAME
    with files.atomic(final) as temporary:
        temporary.write_text(json.dumps(_plain(ledger), indent=2, allow_nan=False) + "\n")
    return final


def load(folder: Path, recipe_sha256: str) -> dict[str, Any]:
    """The ledger of an earlier run of the same recipe.

    Raises RecipeError when the recipe was changed since, InputError when the file is missing or damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise InputError(f"nothing to resume: no {NAME} in {folder}; run without --resume first")
    try:
        ledger: dict[str, Any] = json.loads(path.read_text())
        told = ledger["recipe_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); run without --resume") from error
    if told != recipe_sha256:
        raise RecipeError(
            f"{path} belongs to another version of the recipe ({str(told)[:12]}... and not "
            f"{recipe_sha256[:12]}...); run without --resume, or put the recipe back as it was"
        )
    return ledger


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
