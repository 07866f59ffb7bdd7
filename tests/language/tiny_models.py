"""Tiny random causal models of every kind that is supported, and a tokenizer trained on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from edgecomp.spec import Batch

SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-scaled": ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}  # fmt: skip


@cache
def tiny(kind: str) -> nn.Module:
    """A model of transformers with seeded weights, norms and biases away from their defaults."""
    name, changes = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ids(count: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 320, count)


class Tokens:
    """A data source of rows of ids."""

    labels: tuple[str, ...] = ()
    preprocessing = None

    def __init__(self, count: int = 8, length: int = 24) -> None:
        self.rows = np.stack([ids(length, seed) for seed in range(count)])

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, len(self.rows), size):
            yield Batch((self.rows[start : start + size],))


SENTENCES = [
    "The little ship went out to sea, and the sea was kind to the little ship.",
    "A café by the harbour sells 12 kinds of tea — naïve visitors buy them all.",
    "When the night comes, the lamp of the harbour is lit; ships see it from afar.",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer_folder(folder: Path, vocabulary: int = 320) -> Path:
    """tokenizer.json (byte-level BPE) and tokenizer_config.json, as a model's folder has them."""
    coder = Tokenizer(models.BPE())
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    coder.train_from_iterator(SENTENCES, trainer)
    coder.save(str(folder / "tokenizer.json"))
    facts = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder
