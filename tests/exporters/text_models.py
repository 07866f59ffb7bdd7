"""A small text model (embedding, gated blocks, tied head), and its candidates with weights in groups."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp.compress.groupwise import QuantizeWeights
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.spec import Candidate, Data, TensorSpec

LENGTH = 16


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Gated(nn.Module):
    """ids [1, n] -> logits [1, n, 96]."""

    def __init__(self, width: int = 64, hidden: int = 128, *, tied: bool = True, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(96, width)
        self.norm, self.last = Norm(width), Norm(width)
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)
        self.head = nn.Linear(width, 96, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = self.norm(x)
        x = x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))
        return self.head(self.last(x))


def ids(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, (1, LENGTH))


def text_candidate(**settings: object) -> Candidate:
    return Candidate(Gated(**settings).eval(), (TensorSpec("ids", (1, LENGTH), "int64"),))  # type: ignore[arg-type]


def in_groups(candidate: Candidate, **settings: object) -> Candidate:
    return QuantizeWeights(**{"method": "rtn", **settings})(candidate, Data())  # type: ignore[arg-type]


@torch.no_grad()
def expected(candidate: Candidate, given: np.ndarray) -> np.ndarray:
    """What the plan's integers, restored to float, give in torch."""
    restored = fake_quantize(candidate.module, candidate.quantization)  # type: ignore[arg-type]
    return restored(torch.from_numpy(given)).numpy()
