"""Answers of two decoders to the same prompts, or answers that were written down before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgecomp import progress
from edgecomp.errors import DataError
from edgecomp.language.generation import GenerationSession
from edgecomp.language.sampling import Sampling
from edgecomp.parity.refusals import Answered, compare


def run(
    reference: Path,
    artifact: Path,
    prompts: Path,
    *,
    max_tokens: int = 64,
    chat: bool = True,
    threads: int = 1,
) -> dict[str, Any]:
    """Both sides answer every prompt, greedily; then `edgecomp.parity.refusals.compare`.

    A side is a decoder of `edgecomp export-decoder`, or a `.jsonl` of `{"prompt", "answer"}`. `prompts`: a
    `.jsonl` of `{"prompt", "unsafe"}`. Raises DataError for a file that does not read, and ArtifactError.
    """
    asked = read_lines(prompts, "prompt")
    sides = [_answers(path, asked, max_tokens, chat, threads) for path in (reference, artifact)]
    answered = [
        Answered(str(row["prompt"]), ours, theirs, row.get("unsafe"))
        for row, ours, theirs in zip(asked, *sides, strict=True)
    ]
    return {"reference": str(reference), "artifact": str(artifact), **compare(answered)}


def _answers(
    path: Path, asked: Sequence[Mapping[str, Any]], max_tokens: int, chat: bool, threads: int
) -> list[str]:
    if path.suffix == ".jsonl":
        known = {row["prompt"]: str(row.get("answer", "")) for row in read_lines(path, "answer")}
        missing = [row["prompt"] for row in asked if row["prompt"] not in known]
        if missing:
            raise DataError(f"{path} has no answer to {len(missing)} prompts; the first: {missing[0]!r}")
        return [known[row["prompt"]] for row in asked]
    session = GenerationSession.open(path, threads=threads)
    settings = Sampling(max_tokens=max_tokens)
    found = []
    for number, row in enumerate(asked, 1):
        progress.note(f"{path.name}: prompt {number} of {len(asked)}")
        told = [{"role": "user", "content": row["prompt"]}]
        found.append(
            "".join(session.chat(told, settings)) if chat else session.generate(row["prompt"], settings)
        )
    return found


def read_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, each with `prompt` and `key`. Raises DataError with the line's number."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; expected JSON lines") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"line {number} of {path} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or key not in row:
            raise DataError(f"line {number} of {path} needs the keys 'prompt' and {key!r}")
        if row.get("unsafe") not in (None, True, False):
            raise DataError(f"line {number} of {path}: unsafe is {row['unsafe']!r}; expected true or false")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} holds no line")
    return rows
