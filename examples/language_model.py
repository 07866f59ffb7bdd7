"""A small language model: characters of Python's own documentation, a causal transformer of four blocks.

    edgecomp run examples/language_model.yaml

The text is `pydoc_data.topics`, which comes with Python. The float model is trained on first use, in about a
minute, and kept in build/examples. For models with a tokenizer and a cache see `edgecomp export-decoder`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp import files
from edgecomp.calibration_data.base import IndexedSource
from edgecomp.compress.train import Finetune
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec

LENGTH, WIDTH, BLOCKS = 32, 64, 4
LETTERS = "\n abcdefghijklmnopqrstuvwxyz.,()"
WEIGHTS = Path("build/examples/language_model.pt")


@cache
def text() -> np.ndarray:
    """The documentation in lower case as numbers of LETTERS, int64; anything else is a space."""
    known = {letter: number for number, letter in enumerate(LETTERS)}
    plain = "\n".join(topics[name] for name in sorted(topics)).lower()
    return np.array([known.get(letter, 1) for letter in plain], np.int64)


class Windows(IndexedSource):
    """Windows of 32 letters [N, 32] int64, and for each letter the next one [N, 32]."""

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __init__(self, count: int, seed: int, held_out: bool) -> None:
        whole = text()
        edge = len(whole) * 9 // 10
        part = whole[edge:] if held_out else whole[:edge]
        starts = np.random.default_rng(seed).integers(0, len(part) - LENGTH - 1, count)
        self.windows = part[starts[:, None] + np.arange(LENGTH + 1)]
        self.targets = self.windows[:, 1:]

    def __len__(self) -> int:
        return len(self.windows)

    def read(self, indices: np.ndarray) -> Batch:
        return Batch((self.windows[indices, :-1],), self.windows[indices, 1:])


@cache
def train() -> Windows:
    return Windows(3000, seed=0, held_out=False)


@cache
def calibration() -> Windows:
    return Windows(64, seed=1, held_out=False)


@cache
def evaluation() -> Windows:
    return Windows(100, seed=2, held_out=True)


class Block(nn.Module):
    """Attention to earlier letters and an MLP, normalized before each (Radford et al. 2019)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        normal = self.before_attention(x)
        q, k, v = (
            layer(normal).view(n, length, self.num_heads, self.head_dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(seen.transpose(1, 2).reshape(n, length, self.num_heads * self.head_dim))
        return x + self.mlp(self.before_mlp(x))


class LanguageModel(nn.Module):
    """Letters [N, 32] int64 -> logits [N, 32, 32] of each next letter."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block(WIDTH, 4) for _ in range(BLOCKS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(LETTERS))

    def forward(self, letters: Tensor) -> Tensor:
        x = self.letters(letters) + self.places(torch.arange(letters.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build() -> nn.Module:
    """The trained float model in eval mode."""
    model = LanguageModel().eval()
    if not WEIGHTS.is_file():
        torch.manual_seed(0)
        start = Candidate(LanguageModel().eval(), (TensorSpec("letters", (1, LENGTH), "int64"),))
        settings = Finetune(epochs=6, batch_size=32, learning_rate=2e-3)
        with files.atomic(WEIGHTS) as temporary:
            torch.save(settings(start, Data(train=train())).module.state_dict(), temporary)
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return model
