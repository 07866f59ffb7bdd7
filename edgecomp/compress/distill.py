"""Distillation: a student learns from one or more teachers as well as from labels."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgecomp import registry
from edgecomp.compress import interim
from edgecomp.compress.distill_cache import Teach, TeacherCache
from edgecomp.compress.distill_layers import LayerMatch, Match, pairs_of
from edgecomp.compress.distill_losses import (
    cosine_loss,
    decoupled_loss,
    feature_loss,
    logit_loss,
    relation_loss,
    reverse_loss,
)
from edgecomp.compress.train import Training, check, first_output, task_loss, tensors, trained
from edgecomp.errors import DataError, ModelError
from edgecomp.spec import Candidate, Data

_LOSSES = ("logits", "reverse", "decoupled", "regression", "cosine", "relation")
_OF_OUTPUTS = {"regression": feature_loss, "cosine": cosine_loss, "relation": relation_loss}

__all__ = ["Distill", "logit_loss"]


@dataclass(frozen=True)
class Distill(Training):
    """Train the candidate as a student of the float original, or of the `teachers` named (MODEL specs).

    loss = (1 - alpha) * task_loss + alpha * soft + layer_weight * layers. `soft` by `loss`: logits (Hinton et
    al. 2015), reverse (KL the other way), decoupled (Zhao et al. 2022; needs labels), on logits softened by
    `temperature`; for embeddings and other real outputs regression (mean squared difference), cosine (1 -
    cosine of every vector) or relation (distances within the batch, whatever the widths; Park et al. 2019).
    Several teachers give the mean of their outputs. `alpha` 1 needs no labels. `layers` (dotted names,
    `student=teacher` where they differ) adds the difference of what layers compute, by `match`: feature,
    attention or relation, from the first teacher. With `cache`, a teacher without augmentation and layers
    runs one epoch only; its outputs lie in a memory-mapped temporary file.
    Raises ModelError when there is no teacher or when its outputs have another shape than the student's.
    """

    temperature: float = 4.0
    alpha: float = 0.7
    loss: Literal["logits", "reverse", "decoupled", "regression", "cosine", "relation"] = "logits"
    teachers: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    match: Match = "feature"
    layer_weight: float = 1.0
    cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check("temperature", self.temperature, self.temperature > 0, "a positive number")
        check("alpha", self.alpha, 0 <= self.alpha <= 1, "a weight from 0 (labels only) to 1 (teacher only)")
        check("loss", self.loss, self.loss in _LOSSES, ", ".join(_LOSSES))
        known = ("feature", "attention", "relation")
        check("match", self.match, self.match in known, ", ".join(known))
        check("layer_weight", self.layer_weight, self.layer_weight >= 0, "0 or more")

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        teachers = self._teachers(candidate)
        with ExitStack() as hooks:
            return trained(
                candidate, data, self, lambda m: self._objective(m, teachers, data, hooks), "distill"
            )

    def _teachers(self, candidate: Candidate) -> list[Any]:
        if self.teachers:
            load = registry.load("models", "load")
            return [load(spec) for spec in self.teachers]
        if candidate.original is None:
            raise ModelError(
                "step 'distill' needs a teacher, and the candidate carries no float original; start from a "
                "recipe, or give --teacher"
            )
        return [candidate.original.eval()]

    def _objective(self, student: nn.Module, teachers: list[Any], data: Data, hooks: ExitStack) -> Any:
        """The loss of a batch, and the projections that are trained with the student."""
        matching = self._matching(student, teachers[0], data, hooks)
        teach = self._teach(teachers, len(data.train) if data.train and matching is None else 0, hooks)

        def objective(module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
            logits = first_output(module, inputs)
            total = self.alpha * self._soft(logits, teach(inputs), targets)
            if self.alpha < 1:
                total = total + (1 - self.alpha) * task_loss(logits, targets, self.label_smoothing)
            return total if matching is None else total + self.layer_weight * matching()

        return objective, matching

    def _matching(
        self, student: nn.Module, teacher: nn.Module, data: Data, hooks: ExitStack
    ) -> LayerMatch | None:
        if not self.layers or data.train is None:
            return None
        example = tensors(next(iter(data.train.batches(2))))[0]
        matching = LayerMatch(self.match, pairs_of(self.layers), student, teacher, example)
        hooks.enter_context(matching.student.watching())
        hooks.enter_context(matching.teacher.watching())
        return matching

    def _teach(self, teachers: list[Any], rows: int, hooks: ExitStack) -> Teach:
        @torch.no_grad()
        def ask(inputs: tuple[Tensor, ...]) -> Tensor:
            return torch.stack([first_output(t, inputs) for t in teachers]).mean(dim=0)

        augmented = self.flip or self.shift
        if not self.cache or not rows or augmented:
            return ask
        cache = TeacherCache(ask, rows, interim.folder_for("teacher"))
        interim.attach("teacher", cache)
        hooks.callback(cache.close)
        return cache

    def _soft(self, student: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
        if self.loss == "logits":
            return logit_loss(student, teacher, self.temperature)
        if self.loss == "reverse":
            return reverse_loss(student, teacher, self.temperature)
        if self.loss in _OF_OUTPUTS:
            return _OF_OUTPUTS[self.loss](student, teacher)
        if targets is None or targets.ndim != 1:
            raise DataError("loss decoupled needs one class label for each sample; use loss logits")
        return decoupled_loss(student, teacher, targets, self.temperature)
