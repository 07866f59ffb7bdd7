"""Golden samples: a few inputs and outputs that travel with an artifact and can be replayed anywhere.

`NAME.suffix.golden.npz` holds `input_0`, ... [N, ...] as the torch model takes them, `output_0`, ... as the
artifact itself gave them (its own dtype and layout, reference kernels), `float_0`, ... the float model's.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp import door, files, manifest, registry
from edgecomp.errors import ArtifactError, DataError
from edgecomp.spec import Artifact, DataSource, Session, TensorSpec

SAMPLES = 4
# Stored integers may differ by one step (rounding of another build); floats by this share of the largest.
STEPS = 1
FLOAT_TOLERANCE = {"coreml": 2e-2}
DEFAULT_TOLERANCE = 1e-3


def path_of(artifact: Path) -> Path:
    """`model.tflite` -> `model.tflite.golden.npz`."""
    return artifact.with_name(artifact.name + ".golden.npz")


def record(
    artifact: Artifact,
    source: DataSource,
    reference: Callable[[tuple[np.ndarray, ...]], Sequence[np.ndarray]],
    *,
    samples: int = SAMPLES,
) -> Artifact:
    """Write the golden file of an artifact that lies at its final path; returns it with `golden` set.

    The first `samples` samples of the source are taken, or as many more as fill the artifact's batch.
    Raises DataError when the source has fewer.
    """
    session = _open(artifact.path)
    batch_size = session.inputs[0].shape[0]
    count = -(-samples // batch_size) * batch_size
    batch = next(iter(source.batches(count)), None)
    if batch is None or len(batch) < batch_size:
        raise DataError(f"golden samples need {batch_size} samples; the data has {len(source)}")
    count = len(batch) - len(batch) % batch_size
    inputs = tuple(a[:count] for a in batch.inputs)
    arrays = {f"input_{i}": a for i, a in enumerate(inputs)}
    arrays |= {f"output_{i}": a for i, a in enumerate(raw_outputs(session, inputs))}
    arrays |= {f"float_{i}": np.asarray(a) for i, a in enumerate(reference(inputs))}
    final = path_of(artifact.path)
    with files.atomic(final) as temporary, temporary.open("wb") as stream:
        save(stream, arrays)
    return replace(artifact, golden=final.name)


def save(stream: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz whose bytes depend on the arrays alone: names in order, no time of day."""
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w") as target:
                np.lib.format.write_array(target, np.ascontiguousarray(array), allow_pickle=False)


def raw_outputs(session: Session, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Outputs as the artifact stores them, slices of its batch joined. `inputs` as the torch model's."""
    size = session.inputs[0].shape[0]
    parts = []
    for start in range(0, len(inputs[0]), size):
        stored = [door.into(a[start : start + size], s) for a, s in zip(inputs, session.inputs, strict=True)]
        parts.append(session.run(stored))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def replay(artifact_path: Path) -> dict[str, Any]:
    """Run the golden inputs again and compare: integers within one step, floats within a tolerance.

    `outputs[]`: `name`, `difference` (in steps of the stored integer, or as a share of the largest value),
    `limit`, `unit`, `passed`.
    Raises ArtifactError when the artifact, its manifest or its golden file is missing or damaged.
    """
    artifact = manifest.read(Path(artifact_path))
    inputs, expected = load(artifact)
    session = _open(artifact.path)
    found = raw_outputs(session, inputs)
    if [f.shape for f in found] != [e.shape for e in expected]:
        raise ArtifactError(
            f"{artifact.path} gives outputs of shape {[f.shape for f in found]}, its golden file holds "
            f"{[e.shape for e in expected]}: export the artifact again"
        )
    outputs = [
        judge(spec, e, f, artifact.format)
        for spec, e, f in zip(session.outputs, expected, found, strict=True)
    ]
    return {
        "artifact": str(artifact.path),
        "target": artifact.target,
        "sha256": artifact.sha256,
        "samples": len(inputs[0]),
        "outputs": outputs,
        "passed": all(o["passed"] for o in outputs),
    }


def load(artifact: Artifact) -> tuple[tuple[np.ndarray, ...], list[np.ndarray]]:
    """Golden inputs and the artifact's own outputs. Raises ArtifactError when they cannot be read."""
    if artifact.golden is None:
        raise ArtifactError(f"{artifact.path} has no golden samples; export it again with --data or --calib")
    path = artifact.path.parent / artifact.golden
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ArtifactError(f"the golden file {path} cannot be read ({error}); export again") from error
    inputs = tuple(arrays[f"input_{i}"] for i in range(len(arrays)) if f"input_{i}" in arrays)
    outputs = [arrays[f"output_{i}"] for i in range(len(arrays)) if f"output_{i}" in arrays]
    if not inputs or not outputs:
        raise ArtifactError(f"the golden file {path} holds no input or no output; export again")
    return inputs, outputs


def judge(spec: TensorSpec, expected: np.ndarray, found: np.ndarray, form: str) -> dict[str, Any]:
    """One output against its golden values."""
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
    if expected.dtype.kind in "iu":
        limit, unit = float(STEPS if spec.scale is not None else 0), "steps"
    else:
        limit, unit = FLOAT_TOLERANCE.get(form, DEFAULT_TOLERANCE), "of the largest value"
        difference = difference / max(float(np.abs(expected).max()), 1e-12)
    return {
        "name": spec.name,
        "difference": float(difference),
        "limit": limit,
        "unit": unit,
        "passed": bool(difference <= limit),
    }


def _open(path: Path) -> Session:
    runtime = registry.load("runtimes", registry.format_of(path.suffix))()
    session: Session = runtime.open(path, optimize=False)
    return session
