"""Pruning while training: weights that it moves towards zero, or the smallest, become zero bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgecomp.compress import interim
from edgecomp.compress.macs import count_parameters
from edgecomp.compress.magnitude import weighted
from edgecomp.compress.train import Training, check, first_output, fit, task_loss
from edgecomp.errors import DataError, ModelError
from edgecomp.spec import Candidate, Data, StepRecord


@dataclass(frozen=True)
class PruneMovement(Training):
    """Zero weights by the sign of their movement (Sanh, Wolf and Rush 2020, eq. 1 and 2, hard version).

    A weight's score falls by w * dL/dw at every update: it is high where training moves the weight away from
    zero. With criterion magnitude the score is |w| instead, and a weight that became zero stays zero (gradual
    magnitude pruning, Zhu and Gupta 2017). The share `sparsity` with the lowest scores, over all layers
    (scope global) or of each (layer), is zero; it grows cubically from 0 in the first half of the updates
    (Zhu and Gupta 2017, eq. 1) and stays. By movement a zeroed weight's score rests: it starts again from
    zero once the scores of others fall below its own. `exclude`: patterns of module names that stay dense.
    """

    sparsity: float = 0.5
    criterion: Literal["movement", "magnitude"] = "movement"
    scope: Literal["global", "layer"] = "global"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check("sparsity", self.sparsity, 0 < self.sparsity < 1, "between 0 and 1")
        known = ("movement", "magnitude")
        check("criterion", self.criterion, self.criterion in known, " or ".join(known))
        check("scope", self.scope, self.scope in ("global", "layer"), "global or layer")

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        if candidate.quantization is not None:
            raise ModelError("prune-movement comes after quantize, whose weights are fixed; put it before")
        if data.train is None:
            raise DataError("prune-movement needs training data: give the recipe `data: train:`")
        module = copy.deepcopy(candidate.module)
        layers, skipped = weighted(module, self.exclude)
        updates = self.epochs * max(1, -(-len(data.train) // self.batch_size))
        weights = {f"{n}.weight".removeprefix("."): layer.weight for n, layer in layers.items()}
        mover = Mover(weights, self.sparsity, updates, self.criterion, self.scope)
        interim.attach("movement", mover)

        def objective(module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
            return task_loss(first_output(module, inputs), targets, self.label_smoothing)

        # The last epoch is kept: earlier ones have not reached the sparsity.
        notes = fit(module, data.train, replace(self, validation=0.0), objective, after_update=mover)
        mover.zero()
        total, nonzero = count_parameters(module)
        notes = (*notes, f"{total - nonzero:,} of {total:,} parameters are zero", *skipped)
        record = StepRecord("prune-movement", "prune", asdict(self), notes)
        return replace(candidate, module=module, history=(*candidate.history, record))


class Mover:
    """Scores of weights, updated after each training step; the lowest are set to zero."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        sparsity: float,
        updates: int,
        criterion: Literal["movement", "magnitude"] = "movement",
        scope: Literal["global", "layer"] = "global",
    ) -> None:
        self.weights = dict(weights)
        self.scores = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in self.weights.items()}
        self.criterion, self.scope = criterion, scope
        self.sparsity, self.growing, self.done = sparsity, max(1, updates // 2), 0

    @torch.no_grad()
    def __call__(self) -> None:
        self.done += 1
        for name, weight in self.weights.items():
            if self.criterion == "magnitude":
                self.scores[name] = weight.abs() * self.masks[name]
            elif weight.grad is not None:
                self.scores[name] -= weight * weight.grad
        share = min(1.0, self.done / self.growing)
        self._choose(self.sparsity * (1 - (1 - share) ** 3))
        self.zero()

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "masks": self.masks, "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scores, self.masks, self.done = dict(state["scores"]), dict(state["masks"]), state["done"]

    @torch.no_grad()
    def zero(self) -> None:
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])

    def _choose(self, sparsity: float) -> None:
        if self.scope == "layer":
            self.masks = {n: _kept(s.flatten(), sparsity).view_as(s) for n, s in self.scores.items()}
            return
        keep = _kept(torch.cat([s.flatten() for s in self.scores.values()]), sparsity)
        start = 0
        for name, score in self.scores.items():
            self.masks[name] = keep[start : start + score.numel()].view_as(score)
            start += score.numel()


def _kept(scores: Tensor, sparsity: float) -> Tensor:
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[torch.argsort(scores, stable=True)[: round(len(scores) * sparsity)]] = False
    return keep
