"""A ranking model for recommendations: embeddings of users and things, and an MLP that scores a pair.

    edgecomp run examples/recommender.yaml

The clicks are made here from a seed: users and things have hidden tastes, and a pair is clicked with the
probability that they give. The float model is trained on first use and kept in build/examples.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp import files
from edgecomp.calibration_data.base import IndexedSource
from edgecomp.compress.train import Finetune
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec

USERS, THINGS, TASTES = 200, 150, 3
WEIGHTS = Path("build/examples/recommender.pt")


class Clicks(IndexedSource):
    """`count` pairs [N, 2] int64 (user, thing), and whether the user clicked (0 or 1)."""

    labels: tuple[str, ...] = ("ignored", "clicked")
    preprocessing: Preprocessing | None = None

    def __init__(self, count: int, seed: int) -> None:
        tastes = np.random.default_rng(7)
        users, things = tastes.normal(size=(USERS, TASTES)), tastes.normal(size=(THINGS, TASTES))
        rng = np.random.default_rng(seed)
        self.pairs = np.stack([rng.integers(0, USERS, count), rng.integers(0, THINGS, count)], axis=1)
        liking = 3.0 * (users[self.pairs[:, 0]] * things[self.pairs[:, 1]]).sum(1) / TASTES**0.5
        self.targets = (rng.random(count) < 1 / (1 + np.exp(-liking))).astype(np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, indices: np.ndarray) -> Batch:
        return Batch((self.pairs[indices],), self.targets[indices])


@cache
def train() -> Clicks:
    return Clicks(30_000, seed=0)


@cache
def calibration() -> Clicks:
    return Clicks(256, seed=1)


@cache
def evaluation() -> Clicks:
    return Clicks(3000, seed=2)


class Ranker(nn.Module):
    """Pairs [N, 2] int64 -> logits [N, 2] of ignored and clicked (He et al. 2017, neural filtering)."""

    def __init__(self, width: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.users, self.things = nn.Embedding(USERS, width), nn.Embedding(THINGS, width)
        for table in (self.users, self.things):
            nn.init.normal_(table.weight, std=0.2)
        self.score = nn.Sequential(
            nn.Linear(3 * width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 2),
        )

    def forward(self, pairs: Tensor) -> Tensor:
        user, thing = self.users(pairs[:, 0]), self.things(pairs[:, 1])
        return self.score(torch.cat([user, thing, user * thing], dim=1))


def build() -> nn.Module:
    """The trained float model in eval mode."""
    model = Ranker().eval()
    if not WEIGHTS.is_file():
        torch.manual_seed(0)
        start = Candidate(Ranker().eval(), (TensorSpec("pairs", (1, 2), "int64"),))
        settings = Finetune(epochs=8, batch_size=128, learning_rate=5e-3, weight_decay=0.02)
        with files.atomic(WEIGHTS) as temporary:
            torch.save(settings(start, Data(train=train())).module.state_dict(), temporary)
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return model
