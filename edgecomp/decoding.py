"""Decoders with a cache: from a model or checkpoint to artifacts that generate, checked token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from edgecomp import checkpoint, files, manifest, models, progress, registry
from edgecomp.errors import DataError, InputError, ModelError
from edgecomp.language import bundle, cache, checks, weights
from edgecomp.language.bundle import Bundle
from edgecomp.language.decoder import Decoder
from edgecomp.language.generation import DecoderSession
from edgecomp.language.text import Text
from edgecomp.language.weights import DecoderWeights
from edgecomp.loading import open_data
from edgecomp.numerics import metrics
from edgecomp.spec import Candidate, DataSource, TensorSpec

_SUFFIX = {"tflite": ".tflite", "onnx": ".onnx", "coreml": ".mlpackage"}
_CHECKED = 24
"""Tokens that every artifact is compared on, one by one, after as many or a whole chunk at once."""


@dataclass(frozen=True)
class Wish:
    """What is asked of an artifact. `room`: tokens of the cache. `chunk`: of a prefill of fixed shape.

    `activations`: of 4-bit weights in ONNX and TFLite (Core ML's are float16).
    """

    target: str
    room: int = 1024
    storage: cache.Storage = "float32"
    chunk: int = 64
    activations: cache.Activations = "int8"

    def __post_init__(self) -> None:
        cache.check_storage(self.storage)
        if self.activations not in get_args(cache.Activations):
            raise InputError(f"activations is {self.activations!r}; expected int8 or float")
        if self.room < 2:
            raise InputError(f"room is {self.room}; expected 2 tokens or more")
        if not 1 <= self.chunk <= self.room:
            raise InputError(f"chunk is {self.chunk}; expected 1 to the cache's room of {self.room}")

    @property
    def suffix(self) -> str:
        form = registry.format_of(self.target)
        if form not in registry.names("decoders"):
            known = ", ".join(registry.names("decoders"))
            raise InputError(f"no decoder is written for target {self.target!r}; formats are {known}")
        return _SUFFIX[form]


def load(spec: str) -> Candidate:
    """MODEL (what gives a Decoder or a causal model of transformers, or a folder) or a checkpoint."""
    if spec.endswith((".pt", ".pth")):
        return checkpoint.load(Path(spec))[0]
    decoder = weights.as_decoder(models.load_model(spec))
    return Candidate(decoder, (TensorSpec("ids", (1, 16), "int64"),), original=decoder)


def export(
    model: str, wishes: Sequence[Wish], tokenizer: Path | None, out: Path, calibration: str | None = None
) -> list[dict[str, Any]]:
    """One artifact for each wish, with tokenizer and manifest beside it; `path`, `size_bytes`, `check`.

    `tokenizer`: tokenizer.json or its folder; None where MODEL is a folder that holds it.

    Raises a branch of EdgecompError before any work where it can.
    """
    files.check_writable(out)
    suffixes = [w.suffix for w in wishes]
    if tokenizer is None and not models.is_folder(model):
        raise InputError("no tokenizer given; say where tokenizer.json is with --tokenizer")
    text = Text.read(Path(model) if tokenizer is None else tokenizer)
    source = open_data(calibration) if calibration else None
    if source is None and any(w.storage != "float32" for w in wishes):
        raise InputError("a cache of int8 or int4 needs calibration text for its scales; give --calib")
    candidate = load(model)
    decided = weights.of(candidate)
    a = decided.decoder.architecture
    text.check(a.vocabulary)
    _check_ids(source, a.vocabulary)
    checks.check_memory(8 * sum(p.numel() for p in decided.decoder.parameters()), "exporting this decoder")
    for wish in wishes:
        if wish.room > a.context:
            raise InputError(f"room is {wish.room}; the model was trained for {a.context} tokens at most")
    results = []
    for wish, suffix in zip(wishes, suffixes, strict=True):
        path = out / f"{wish.target}{suffix}"
        results.append(_one(candidate, decided, wish, path, text, source))
    return results


def _one(
    candidate: Candidate,
    decided: DecoderWeights,
    wish: Wish,
    path: Path,
    text: Text,
    source: DataSource | None,
) -> dict[str, Any]:
    progress.note(f"exporting {path.name}")
    restored = decided.restored()
    scales = cache.scales_from(restored, _rows(source), wish.storage) if source else None
    write = registry.load("decoders", registry.format_of(wish.target))
    artifact = write(
        candidate, decided, path, target=wish.target, room=wish.room, chunk=wish.chunk,
        storage=wish.storage, scales=scales, activations=wish.activations,
    )  # fmt: skip
    manifest.write(artifact)
    ends = text.ends()
    bundle.write(
        path,
        Bundle(
            decided.decoder.architecture, wish.room, wish.storage, "", wish.chunk, ends, text.template,
            text.special,
        ),
        text,
    )  # fmt: skip
    session = registry.load("decoder_runtimes", registry.format_of(path.suffix))(path, wish.room, 1)
    check = compared(session, restored, _sample(source, decided, wish), wish.chunk)
    return {"path": str(path), "size_bytes": artifact.size_bytes, "manifest": manifest.to_json(artifact),
            "check": check}  # fmt: skip


def _rows(source: DataSource | None) -> list[torch.Tensor]:
    """Rows of token ids, [1, T] each."""
    if source is None:
        return []
    found = [torch.from_numpy(np.array(b.inputs[0])) for b in source.batches(1)]
    if any(r.dtype != torch.int64 or r.dim() != 2 for r in found):
        raise InputError("calibration text must be rows of token ids, int64 [N, T]")
    return found


def _check_ids(source: DataSource | None, vocabulary: int) -> None:
    for row in _rows(source):
        if int(row.min()) < 0 or int(row.max()) >= vocabulary:
            raise DataError(
                f"the calibration text holds id {int(row.max())}; the model's vocabulary has {vocabulary}, "
                "from 0: was it tokenized for another model?"
            )


def _sample(source: DataSource | None, decided: DecoderWeights, wish: Wish) -> np.ndarray:
    count = min(max(_CHECKED, wish.chunk) + _CHECKED, wish.room)
    rows = _rows(source)
    if rows and rows[0].shape[1] >= count:
        return rows[0][0, :count].numpy()
    return np.random.default_rng(0).integers(0, decided.decoder.architecture.vocabulary, count)


@torch.no_grad()
def compared(session: DecoderSession, decoder: Decoder, ids: np.ndarray, chunk: int = 1) -> dict[str, Any]:
    """The artifact, a part of the text at once and then token by token, against teacher-forced logits.

    The part is half of the text, or a whole `chunk` where that is more; where nothing is left after it, the
    first tokens are given again, one by one. Keys: `tokens`, `top1_agreement`, `sqnr_db`, `max_abs_error`.
    Raises ModelError on NaN.
    """
    expected = decoder(torch.from_numpy(ids)[None])[0].numpy()
    first = min(max(len(ids) // 2, chunk), len(ids))
    session.reset()
    steps = [session.step(ids[:first]), *(session.step(ids[i : i + 1]) for i in range(first, len(ids)))]
    if first == len(ids):
        session.reset()
        again = min(_CHECKED, len(ids))
        steps += [session.step(ids[i : i + 1]) for i in range(again)]
        expected = np.concatenate([expected, expected[:again]])
    found = np.concatenate(steps)
    if not np.isfinite(found).all():
        raise ModelError("the artifact gives NaN or Inf where the decoder gives numbers; report the model")
    return {
        "tokens": len(found),
        "top1_agreement": float((found.argmax(1) == expected.argmax(1)).mean()),
        "sqnr_db": float(metrics.sqnr_db(expected, found)),
        "max_abs_error": float(np.abs(found - expected).max()),
    }


def recorded(path: Path) -> dict[str, Any]:
    """What lies beside an artifact, as plain data."""
    return dict(json.loads(bundle.path_of(path).read_text()))
