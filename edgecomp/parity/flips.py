"""Negative flips: samples that the float model gets right and the artifact gets wrong, with their inputs."""

from __future__ import annotations

import struct
import wave
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp import files
from edgecomp.parity.observe import Observations
from edgecomp.spec import DataSource, Preprocessing

LISTED = 50


def negative_flips(seen: Observations, name: str, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The first LISTED of them, the surest mistakes first: `index`, `target`, `reference`, `artifact`."""
    sides = seen.reference, seen.tests[name]
    predicted = [s.joined("predicted") for s in sides]
    confidence = [s.joined("confidence") for s in sides]
    targets = seen.targets
    if predicted[0] is None or predicted[1] is None or confidence[1] is None or targets is None:
        return []
    if targets.ndim != 1 or targets.dtype.kind not in "iu":
        return []
    flipped = np.flatnonzero((predicted[0] == targets) & (predicted[1] != targets))
    order = flipped[np.argsort(-confidence[1][flipped], kind="stable")][:LISTED]

    def label(c: int) -> str:
        return labels[c] if c < len(labels) else str(c)

    return [
        {
            "index": int(i),
            "target": label(int(targets[i])),
            "artifact": label(int(predicted[1][i])),
            "artifact_confidence": float(confidence[1][i]),
            "reference_confidence": float(confidence[0][i]) if confidence[0] is not None else None,
            "row": {k: v for k, v in seen.rows[i].items() if isinstance(v, str | int | float)},
            "input": None,
        }
        for i in order
    ]


def save_inputs(flips: Sequence[dict[str, Any]], source: DataSource, folder: Path) -> list[dict[str, Any]]:
    """Write each flip's input to `folder`: PNG for a picture, WAV for a sound, TXT where its row has a text.

    Returns the flips with `input` set to the file's name. One more pass over the data. Raises OutputError.
    """
    wanted = {f["index"]: f for f in flips}
    written: dict[int, str] = {}
    start = 0
    for batch in source.batches(32):
        for i in sorted(set(range(start, start + len(batch))) & set(wanted)):
            row = batch.rows[i - start] if batch.rows else {}
            stem = folder / f"flip-{i}"
            name = write_text(row, stem) or write_input(
                batch.inputs[0][i - start], source.preprocessing, stem
            )
            if name is not None:
                written[i] = name
        start += len(batch)
        if start > max(wanted, default=-1):
            break
    return [{**f, "input": written.get(f["index"])} for f in flips]


def write_text(row: Mapping[str, Any], stem: Path) -> str | None:
    """The row's `text` as a file; its name, or None when it has none."""
    if not isinstance(row.get("text"), str):
        return None
    final = stem.with_suffix(".txt")
    with files.atomic(final) as temporary:
        temporary.write_text(row["text"] + "\n", encoding="utf-8")
    return final.name


def write_input(sample: np.ndarray, how: Preprocessing | None, stem: Path) -> str | None:
    """One sample as a file; its name, or None when it is neither picture nor sound."""
    if how is not None and how.sample_rate is not None:
        final = stem.with_suffix(".wav")
        with files.atomic(final) as temporary:
            _write_wav(temporary, sample, how)
        return final.name
    pixels = to_pixels(sample, how)
    if pixels is None:
        return None
    final = stem.with_suffix(".png")
    with files.atomic(final) as temporary:
        temporary.write_bytes(png(pixels))
    return final.name


def to_pixels(sample: np.ndarray, how: Preprocessing | None) -> np.ndarray | None:
    """A sample [C, H, W] or [H, W, C] -> uint8 [H, W, 1 or 3], the normalization undone.

    Without a preprocessing the values are stretched from their smallest to their largest.
    """
    if sample.ndim != 3:
        return None
    last = how.layout == "NHWC" if how is not None else sample.shape[0] not in (1, 3)
    values = np.asarray(sample, np.float64) if last else np.moveaxis(np.asarray(sample, np.float64), 0, -1)
    if values.shape[-1] not in (1, 3):
        return None
    if how is None:
        span = values.max() - values.min() or 1.0
        return np.rint((values - values.min()) / span * 255).astype(np.uint8)
    values = (values * np.asarray(how.std) + np.asarray(how.mean)) / how.rescale
    if how.colour_order == "BGR":
        values = values[..., ::-1]
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 1 or 3] -> a PNG file. PNG specification (ISO/IEC 15948), filter 0 on every row."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(pixels))
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _write_wav(path: Path, sample: np.ndarray, how: Preprocessing) -> None:
    signal = sample[:, None] if sample.ndim == 1 else sample if how.layout == "NWC" else sample.T
    signal = signal * np.asarray(how.std) + np.asarray(how.mean)
    with wave.open(str(path), "wb") as out:
        out.setnchannels(signal.shape[1])
        out.setsampwidth(2)
        out.setframerate(how.sample_rate or 0)
        out.writeframes(np.clip(np.rint(signal * 32768), -32768, 32767).astype("<i2").tobytes())
