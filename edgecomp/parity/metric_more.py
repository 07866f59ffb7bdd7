"""Metrics of segmentation, detection, embeddings and language models.

Each states which outputs and targets it takes; `edgecomp.parity.metric` says what a metric is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgecomp.parity.metric_check import expect


@dataclass(frozen=True)
class MeanIoU:
    """Mean over classes of intersection / union. Outputs [N, classes, H, W], targets int [N, H, W].

    Intersections and unions are summed over the samples before dividing (Everingham et al., The Pascal Visual
    Object Classes Challenge, 2010, sec. 4.2). Classes in neither are left out; target 255 is ignored.
    """

    name: str = "miou"
    higher_is_better: bool = True
    binary: bool = False

    def states(self, outputs: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
        scores = outputs[0]
        fits = scores.ndim == 4 and targets.shape == (scores.shape[0], *scores.shape[2:])
        expect(self.name, scores, "[N, classes, H, W]", fits, targets, "[N, H, W]", fits)
        predicted, classes = scores.argmax(axis=1), scores.shape[1]
        valid = targets != 255
        rows = []
        for p, t, v in zip(predicted, targets, valid, strict=True):
            both = np.bincount(p[v & (p == t)], minlength=classes)
            union = np.bincount(p[v], minlength=classes) + np.bincount(t[v], minlength=classes) - both
            rows.append(np.concatenate([both, union]))
        return np.array(rows, dtype=np.float64)

    def value(self, states: np.ndarray) -> float:
        both, union = np.split(states.sum(axis=0), 2)
        there = union > 0
        return float(np.mean(both[there] / union[there])) if there.any() else float("nan")


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log likelihood. Outputs [N, T, vocabulary], targets int [N, T].

    `targets[n, t]` is the token that `outputs[n, t]` predicts (already shifted); -100 is ignored.
    """

    name: str = "perplexity"
    higher_is_better: bool = False
    binary: bool = False

    def states(self, outputs: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
        scores = outputs[0].astype(np.float64)
        fits = scores.ndim == 3 and targets.shape == scores.shape[:2]
        expect(self.name, outputs[0], "[N, T, vocabulary]", fits, targets, "[N, T]", fits)
        top = scores.max(axis=-1, keepdims=True)
        log_sum = np.log(np.exp(scores - top).sum(axis=-1)) + top[..., 0]
        counted = targets >= 0
        picked = np.take_along_axis(scores, np.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
        nll = np.where(counted, log_sum - picked, 0.0)
        return np.stack([nll.sum(axis=1), counted.sum(axis=1)], axis=1)

    def value(self, states: np.ndarray) -> float:
        nll, count = states.sum(axis=0)
        return float(np.exp(nll / count)) if count else float("nan")


@dataclass(frozen=True)
class RecallAtK:
    """Share of samples with one of their class among the `k` nearest others, by cosine.

    Outputs [N, D] embeddings, targets int [N] classes. Manning et al., Introduction to Information Retrieval
    (2008), ch. 8.4, with one relevant neighbour being enough. Copies of a sample count once.
    """

    k: int = 1
    higher_is_better: bool = True
    binary: bool = False

    @property
    def name(self) -> str:
        return f"recall_at_{self.k}"

    def states(self, outputs: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
        vectors = outputs[0].astype(np.float64)
        fits = vectors.ndim == 2 and targets.shape == (len(vectors),)
        expect(self.name, outputs[0], "[N, D]", fits, targets, "[N]", fits)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.concatenate([vectors / np.where(norms == 0, 1, norms), targets[:, None]], axis=1)

    def value(self, states: np.ndarray) -> float:
        states = np.unique(states, axis=0)
        vectors, classes = states[:, :-1], states[:, -1]
        similarity = vectors @ vectors.T
        np.fill_diagonal(similarity, -np.inf)
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : self.k]
        return float((classes[nearest] == classes[:, None]).any(axis=1).mean())


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of a score [N] or [N, 1] with its target [N]; ties share their rank."""

    name: str = "spearman"
    higher_is_better: bool = True
    binary: bool = False

    def states(self, outputs: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
        fits = outputs[0].size == targets.size == len(targets)
        expect(self.name, outputs[0], "[N] or [N, 1]", fits, targets, "[N]", fits)
        return np.stack([outputs[0].reshape(-1).astype(np.float64), targets.reshape(-1)], axis=1)

    def value(self, states: np.ndarray) -> float:
        ranks = [_ranks(states[:, 0]), _ranks(states[:, 1])]
        if any(r.std() == 0 for r in ranks):
            return float("nan")
        return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle: np.ndarray = (ends - (counts - 1) / 2)[inverse]
    return middle


@dataclass(frozen=True)
class AveragePrecision:
    """Mean average precision of detections at one IoU threshold.

    Outputs [N, boxes, 6] of x1, y1, x2, y2, score, class (score 0: no box); targets [N, boxes, 5] of x1, y1,
    x2, y2, class (class -1: no box). All points of the precision envelope (Pascal VOC 2010 onwards).
    """

    iou: float = 0.5
    higher_is_better: bool = True
    binary: bool = False

    @property
    def name(self) -> str:
        return f"map{round(self.iou * 100)}"

    def states(self, outputs: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
        found = outputs[0]
        fits = found.ndim == 3 and found.shape[2] == 6
        right = targets.ndim == 3 and targets.shape[2] == 5
        expect(self.name, found, "[N, boxes, 6]", fits, targets, "[N, boxes, 5]", right)
        states = np.empty(len(found), dtype=object)
        for i, (f, t) in enumerate(zip(found, targets, strict=True)):
            states[i] = self._matched(f[f[:, 4] > 0], t[t[:, 4] >= 0])
        return states

    def _matched(self, found: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of (class, score, hit) in order of score, and the classes of the true boxes."""
        found = found[np.argsort(-found[:, 4], kind="stable")]
        free = np.ones(len(truth), bool)
        rows = []
        for box in found:
            overlap = np.where(free & (truth[:, 4] == box[5]), _iou(box, truth), 0.0)
            best = int(overlap.argmax()) if len(truth) else -1
            hit = best >= 0 and overlap[best] >= self.iou
            if hit:
                free[best] = False
            rows.append((box[5], box[4], float(hit)))
        return np.array(rows, dtype=np.float64).reshape(-1, 3), truth[:, 4]

    def value(self, states: np.ndarray) -> float:
        found = np.concatenate([s[0] for s in states])
        truth = np.concatenate([s[1] for s in states])
        scores = [_area(found[found[:, 0] == c], int(np.sum(truth == c))) for c in np.unique(truth)]
        return float(np.mean(scores)) if scores else float("nan")


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    width = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    height = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    both = np.clip(width, 0, None) * np.clip(height, 0, None)
    areas = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
    union = (box[2] - box[0]) * (box[3] - box[1]) + areas - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def _area(found: np.ndarray, total: int) -> float:
    """Area below the precision envelope of one class."""
    hits = found[np.argsort(-found[:, 1], kind="stable"), 2]
    recall = np.concatenate([[0.0], np.cumsum(hits) / total])
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope))
