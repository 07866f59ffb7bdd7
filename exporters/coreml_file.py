"""An `.mlpackage` folder whose bytes depend on its content only: no random ids, no dates, sorted maps."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

_AUTHOR = "com.apple.CoreML"
_MODEL = "com.apple.CoreML/model.mlmodel"
_WEIGHTS = "com.apple.CoreML/weights"


def write(folder: Path, spec: Any, weights: bytes) -> None:
    """Write the package: Manifest.json, the model, and its weights."""
    data = folder / "Data" / "com.apple.CoreML"
    (data / "weights").mkdir(parents=True)
    (data / "model.mlmodel").write_bytes(spec.SerializeToString(deterministic=True))
    (data / "weights" / "weight.bin").write_bytes(weights)
    entries = {
        _identifier(_MODEL): _entry("CoreML Model Specification", _MODEL),
        _identifier(_WEIGHTS): _entry("CoreML Model Weights", _WEIGHTS),
    }
    facts = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": _identifier(_MODEL),
    }
    (folder / "Manifest.json").write_text(json.dumps(facts, indent=4, sort_keys=True) + "\n")


def _identifier(path: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper()


def _entry(description: str, path: str) -> dict[str, str]:
    return {"author": _AUTHOR, "description": description, "name": path.rpartition("/")[2], "path": path}
