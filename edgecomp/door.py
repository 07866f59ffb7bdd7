"""Between float arrays as the torch model takes them and what an artifact takes at its door."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgecomp.errors import DataError
from edgecomp.spec import Session, TensorSpec

_TO_LAST = {"NHWC": (0, 2, 3, 1), "NWC": (0, 2, 1)}
_TO_FIRST = {"NHWC": (0, 3, 1, 2), "NWC": (0, 2, 1)}


def into(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Float (or integer) array in torch's order -> the artifact's layout and dtype.

    Quantized door: q = clip(round_half_even(x / scale) + zero_point), the rounding of TFLite and ONNX.
    Raises DataError when the shape does not fit.
    """
    if spec.layout in _TO_LAST:
        array = np.ascontiguousarray(array.transpose(_TO_LAST[spec.layout]))
    if tuple(array.shape) != spec.shape:
        raise DataError(
            f"input {spec.name!r} has shape {tuple(array.shape)}; the artifact expects {spec.shape} "
            f"({spec.layout or 'as the model'}): check the data source and its preprocessing"
        )
    if spec.scale is None:
        return np.ascontiguousarray(array, dtype=spec.dtype)
    limits = np.iinfo(spec.dtype)
    q = np.rint(array.astype(np.float32) / np.float32(spec.scale)) + (spec.zero_point or 0)
    return np.ascontiguousarray(np.clip(q, limits.min, limits.max).astype(spec.dtype))


def out_of(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """The artifact's output -> float32 (integers that are not quantized stay) in torch's order."""
    if spec.scale is not None:
        array = (array.astype(np.float32) - np.float32(spec.zero_point or 0)) * np.float32(spec.scale)
    if spec.layout in _TO_FIRST:
        array = array.transpose(_TO_FIRST[spec.layout])
    return array if np.issubdtype(array.dtype, np.integer) else array.astype(np.float32)


def run_float(session: Session, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Run a whole batch through an artifact of fixed batch size, a slice at a time.

    `inputs`: arrays [N, ...] as the torch model takes them; returns arrays [N, ...] in float32.
    """
    size = session.inputs[0].shape[0]
    total = len(inputs[0])
    if total % size:
        raise DataError(f"{total} samples do not divide by the artifact's batch of {size}: give a multiple")
    parts: list[list[np.ndarray]] = []
    for start in range(0, total, size):
        stored = [into(a[start : start + size], s) for a, s in zip(inputs, session.inputs, strict=True)]
        results = session.run(stored)
        parts.append([out_of(r, s) for r, s in zip(results, session.outputs, strict=True)])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]
