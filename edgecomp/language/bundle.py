"""What travels beside a decoder: its architecture, its cache, its tokenizer and its chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgecomp import files
from edgecomp.errors import ArtifactError
from edgecomp.language.architecture import Architecture
from edgecomp.language.text import Text


@dataclass(frozen=True)
class Bundle:
    """`room`: tokens that the cache holds. `chunk`: tokens of a prefill where shapes are fixed (0: any).

    `ends`: ids that end a text. `special`: names of special tokens, for the chat template.
    """

    architecture: Architecture
    room: int
    storage: str
    tokenizer_sha256: str
    chunk: int = 0
    ends: tuple[int, ...] = ()
    template: str = ""
    special: Mapping[str, str] | None = None


def path_of(artifact: Path) -> Path:
    """`model.onnx` -> `model.onnx.decoder.json`."""
    return artifact.with_name(artifact.name + ".decoder.json")


def tokenizer_of(artifact: Path) -> Path:
    """`model.onnx` -> `model.onnx.tokenizer.json`."""
    return artifact.with_name(artifact.name + ".tokenizer.json")


def write(artifact: Path, bundle: Bundle, text: Text) -> None:
    """Write the tokenizer and the description beside the artifact, each atomically."""
    with files.atomic(tokenizer_of(artifact)) as temporary:
        text.coder.save(str(temporary), pretty=False)
    facts = {**asdict(bundle), "tokenizer_sha256": files.sha256(tokenizer_of(artifact))}
    with files.atomic(path_of(artifact)) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n")


def read(artifact: Path) -> tuple[Bundle, Text]:
    """Raises ArtifactError when the artifact was exported without a cache, or its tokenizer was changed."""
    path = path_of(artifact)
    if not artifact.exists():
        raise ArtifactError(f"no artifact at {artifact}; expected a decoder that export-decoder wrote")
    if not path.is_file():
        raise ArtifactError(
            f"{artifact} has no {path.name}: it is no decoder with a cache; write one with "
            "`edgecomp export-decoder MODEL --tokenizer FILE`"
        )
    try:
        bundle = _parsed(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); export the decoder again") from error
    tokenizer = tokenizer_of(artifact)
    if not tokenizer.is_file() or files.sha256(tokenizer) != bundle.tokenizer_sha256:
        raise ArtifactError(f"{tokenizer} is missing or was changed; export the decoder again")
    found = Text.read(tokenizer)
    return bundle, Text(found.coder, bundle.template, bundle.special)


def _parsed(facts: dict[str, Any]) -> Bundle:
    a = facts.pop("architecture")
    architecture = Architecture(**{**a, "windows": tuple(a["windows"])})
    return Bundle(architecture=architecture, **{**facts, "ends": tuple(facts["ends"])})
