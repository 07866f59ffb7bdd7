"""A tiny random decoder with its tokenizer, as `export-decoder` leaves it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgecomp import decoding
from edgecomp.language.architecture import Architecture
from edgecomp.language.cache import Storage
from edgecomp.language.decoder import Decoder

ROOM = 64
A = Architecture("llama", 300, 32, 48, 2, 4, 2, 16, ROOM, 1e-5, attention_scale=0.25)
PROMPT = "the little ship"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}:{% endfor %}"


def make() -> Decoder:
    """MODEL: seeded weights, so large that a few percent of rounding changes no likeliest token."""
    torch.manual_seed(0)
    found = Decoder(A, [10000.0 ** (-torch.arange(0, 16, 2) / 16) for _ in range(A.layers)]).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return found


def tokenizer(folder: Path) -> Path:
    """tokenizer.json of single bytes, with a chat template beside it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    coder = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, []))
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    coder.save(str(folder / "tokenizer.json"))
    facts = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


def write(
    folder: Path, targets: tuple[str, ...] = ("onnx-fp32", "tflite-fp32"), storage: Storage = "int8"
) -> dict[str, Path]:
    """An artifact of each target with a cache of `storage`, by the target's name."""
    rows = np.random.default_rng(0).integers(2, 258, (4, 32))
    np.save(folder / "ids.npy", rows)
    wishes = [decoding.Wish(t, ROOM, storage, chunk=4) for t in targets]
    made = decoding.export(
        f"{Path(__file__)}:make", wishes, tokenizer(folder), folder / "out", str(folder / "ids.npy")
    )
    return {t: Path(m["path"]) for t, m in zip(targets, made, strict=True)}
