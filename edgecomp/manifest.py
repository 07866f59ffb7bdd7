"""What an artifact says of itself: the manifest beside it and the same facts embedded in the file.

An exporter embeds `embedded(...)` as a JSON string under the key `KEY` in its format's own metadata
and calls `describe(...)` on the finished file; the pipeline adds golden samples and writes the manifest.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from edgecomp import files
from edgecomp.errors import ArtifactError
from edgecomp.spec import Artifact, Candidate, Data, Preprocessing, Problem, StepRecord, TensorSpec

KEY = "edgecomp"


def path_of(artifact: Path) -> Path:
    """`model.tflite` -> `model.tflite.manifest.json`."""
    return artifact.with_name(artifact.name + ".manifest.json")


def versions(*distributions: str) -> dict[str, str]:
    """Versions of Python, and of edgecomp, torch, NumPy and the named distributions as installed."""
    found = {"python": platform.python_version()}
    for name in ("edgecomp", "torch", "numpy", *distributions):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def draft(
    candidate: Candidate,
    data: Data,
    *,
    path: Path,
    target: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    skipped: Sequence[Problem] = (),
    made_with: Sequence[str] = (),
) -> Artifact:
    """An Artifact as far as it is known before the file is written (no hash, no size)."""
    source = data.evaluation or data.calibration or data.train
    return Artifact(
        path=path,
        format=target.split("-")[0],
        target=target,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        sha256="",
        size_bytes=0,
        history=candidate.history,
        preprocessing=source.preprocessing if source else None,
        labels=source.labels if source else (),
        skipped=tuple(skipped),
        versions=versions(*made_with),
    )


def embedded(artifact: Artifact) -> str:
    """The facts that go into the file itself, as JSON with sorted keys (no hash, size or golden)."""
    facts = to_json(artifact)
    for key in ("sha256", "size_bytes", "golden"):
        del facts[key]
    return json.dumps(facts, sort_keys=True)


def describe(artifact: Artifact, written: Path) -> Artifact:
    """Complete a draft with hash and size of the file that was written (before it is moved in place)."""
    return replace(artifact, sha256=files.sha256(written), size_bytes=files.size_bytes(written))


def to_json(artifact: Artifact) -> dict[str, Any]:
    """The manifest's keys, in the order that docs/contract.md lists them."""
    return {
        "format": artifact.format,
        "target": artifact.target,
        "inputs": [asdict(t) for t in artifact.inputs],
        "outputs": [asdict(t) for t in artifact.outputs],
        "preprocessing": artifact.preprocessing.to_json() if artifact.preprocessing else None,
        "labels": list(artifact.labels),
        "size_bytes": artifact.size_bytes,
        "sha256": artifact.sha256,
        "golden": artifact.golden,
        "recipe_sha256": artifact.recipe_sha256,
        "history": [asdict(r) for r in artifact.history],
        "versions": dict(artifact.versions),
        "skipped": [asdict(p) for p in artifact.skipped],
    }


def write(artifact: Artifact) -> Path:
    """Write the manifest beside the artifact, atomically."""
    final = path_of(artifact.path)
    with files.atomic(final) as temporary:
        temporary.write_text(json.dumps(to_json(artifact), indent=2) + "\n")
    return final


def read(path: Path) -> Artifact:
    """The artifact at `path`, from the manifest beside it.

    Raises ArtifactError when the artifact or its manifest is missing or damaged, or the hash differs.
    """
    if not path.exists():
        raise ArtifactError(
            f"no artifact at {path}; expected a .tflite or .onnx file or an .mlpackage folder"
        )
    manifest = path_of(path)
    if not manifest.exists():
        raise ArtifactError(f"{path} has no manifest ({manifest.name}); it is written by `edgecomp export`")
    try:
        facts = json.loads(manifest.read_text())
        artifact = _from_json(path, facts)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{manifest} is damaged ({error}); export the artifact again") from error
    found = files.sha256(path)
    if found != artifact.sha256:
        raise ArtifactError(
            f"{path} has SHA-256 {found[:12]}..., its manifest says {artifact.sha256[:12]}...; "
            "the file was changed or cut short: export it again"
        )
    return artifact


def _from_json(path: Path, facts: Mapping[str, Any]) -> Artifact:
    return Artifact(
        path=path,
        format=facts["format"],
        target=facts["target"],
        inputs=tuple(_tensor(t) for t in facts["inputs"]),
        outputs=tuple(_tensor(t) for t in facts["outputs"]),
        sha256=facts["sha256"],
        size_bytes=facts["size_bytes"],
        history=tuple(
            StepRecord(r["name"], r["kind"], r["settings"], tuple(r.get("notes", ())))
            for r in facts["history"]
        ),
        preprocessing=Preprocessing.from_json(facts["preprocessing"]) if facts["preprocessing"] else None,
        labels=tuple(facts["labels"]),
        skipped=tuple(Problem(**p) for p in facts["skipped"]),
        recipe_sha256=facts["recipe_sha256"],
        golden=facts["golden"],
        versions=facts["versions"],
    )


def _tensor(facts: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(**{**facts, "shape": tuple(facts["shape"])})
