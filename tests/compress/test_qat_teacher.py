"""Quantization-aware training with a teacher: the chain's float original, unpruned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from edgecomp.compress.distill import logit_loss
from edgecomp.compress.qat import QuantizeAwareTraining
from edgecomp.errors import RecipeError
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec


@dataclass
class Arrays:
    x: np.ndarray
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield Batch((self.x[start : start + size],))


def net(seed: int, width: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).eval()


def off(candidate: Candidate, teacher: nn.Module, x: np.ndarray) -> float:
    """Divergence of the quantized net from the teacher, a sample at a time as the graph takes them."""
    graph = fake_quantize(candidate.module, candidate.quantization)
    with torch.no_grad():
        found = torch.cat([graph(torch.from_numpy(row[None]))[0] for row in x]).reshape(len(x), -1)
        return float(logit_loss(found, teacher(torch.from_numpy(x)), 1.0))


@pytest.mark.parametrize("loss", ["regression", "logits"])
def test_the_original_teaches_more_than_the_model_that_is_quantized(loss: str) -> None:
    teacher, student = net(0, 24), net(1, 8)
    x = np.random.default_rng(0).standard_normal((96, 6)).astype(np.float32)
    start = Candidate(student, (TensorSpec("x", (1, 6)),), original=teacher)
    common = {"epochs": 8, "batch_size": 32, "learning_rate": 0.05, "alpha": 1.0, "validation": 0.0}
    results = {
        who: QuantizeAwareTraining(**common, teacher=who, loss=loss, temperature=1.0)(  # type: ignore[arg-type]
            start, Data(train=Arrays(x), calibration=Arrays(x))
        )
        for who in ("float", "original")
    }
    distances = {who: off(c, teacher, x) for who, c in results.items()}
    assert distances["original"] < 0.5 * distances["float"]
    assert results["original"].history[-1].settings["teacher"] == "original"


def test_unknown_teachers_and_losses_are_refused() -> None:
    with pytest.raises(RecipeError, match="teacher is student"):
        QuantizeAwareTraining(teacher="student")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="loss is kl"):
        QuantizeAwareTraining(loss="kl")  # type: ignore[arg-type]
