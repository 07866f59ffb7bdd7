"""How far predicted distributions moved: KL divergence and top-k agreement, for classes and tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

TOP_K = 5
# Values handled at a time, so that a vocabulary of 100,000 does not multiply the memory of a batch.
_CHUNK = 1 << 22


@dataclass
class DistributionTally:
    """Sums over positions: one for each sample [N, classes], or for each token [N, T, vocabulary].

    KL divergence: sum p log(p / q) in nats, p the float model's softmax and q the artifact's (Kullback and
    Leibler, On Information and Sufficiency, 1951). `top_k`: share of the float model's k likeliest that are
    among the artifact's k likeliest. Positions whose target is negative are padding and not counted.
    """

    k: int = TOP_K
    positions: int = 0
    divergence: float = 0.0
    same_first: int = 0
    overlap: float = 0.0
    samples: list[float] = field(default_factory=list)

    def add(self, reference: np.ndarray, test: np.ndarray, targets: np.ndarray | None) -> None:
        """Scores (logits or probabilities) of one batch. Other shapes than those two are left out."""
        if reference.ndim not in (2, 3) or reference.shape[-1] < 2 or reference.dtype.kind != "f":
            return
        counted = np.ones(reference.shape[:-1], bool)
        if reference.ndim == 3 and targets is not None and targets.shape == counted.shape:
            counted = targets >= 0
        for i in range(len(reference)):
            if counted[i].any():
                self._add_sample(reference[i][counted[i]], test[i][counted[i]])

    def _add_sample(self, reference: np.ndarray, test: np.ndarray) -> None:
        rows, width = np.atleast_2d(reference), reference.shape[-1]
        others, step = np.atleast_2d(test), max(1, _CHUNK // width)
        total = 0.0
        for start in range(0, len(rows), step):
            total += self._add_rows(rows[start : start + step], others[start : start + step])
        self.samples.append(total / len(rows))

    def _add_rows(self, reference: np.ndarray, test: np.ndarray) -> float:
        log_p, log_q = log_probabilities(reference), log_probabilities(test)
        divergence = float(np.sum(np.exp(log_p) * (log_p - log_q)))
        k = min(self.k, reference.shape[-1])
        ours, theirs = (np.argpartition(-x, k - 1, axis=-1)[:, :k] for x in (log_p, log_q))
        self.overlap += float(np.mean(ours[:, :, None] == theirs[:, None, :], axis=(1, 2)).sum()) * k
        self.same_first += int(np.sum(log_p.argmax(-1) == log_q.argmax(-1)))
        self.divergence += divergence
        self.positions += len(reference)
        return divergence

    def facts(self) -> dict[str, Any] | None:
        """`positions`, `kl` (mean, nats), `kl_p99` of samples, `top1`, `top_k` and `k`; None without any."""
        if self.positions == 0:
            return None
        return {
            "positions": self.positions,
            "kl": self.divergence / self.positions,
            "kl_p99": float(np.percentile(self.samples, 99)),
            "top1": self.same_first / self.positions,
            "k": self.k,
            "top_k": self.overlap / self.positions,
        }


def log_probabilities(scores: np.ndarray) -> np.ndarray:
    """log softmax over the last axis; rows that are distributions already are taken as they are.

    Probabilities below 1e-12 count as that: an integer softmax gives exact zeros.
    """
    x = scores.astype(np.float64)
    if bool(np.all(x >= 0)) and bool(np.all(np.abs(x.sum(-1) - 1) < 0.02)):
        floored = np.maximum(x, 1e-12)
        return np.asarray(np.log(floored / floored.sum(-1, keepdims=True)))
    shifted = x - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
