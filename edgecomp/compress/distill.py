"""Distillation: a student learns from a teacher's logits as well as from labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecomp.compress.train import Training, check, first_output, task_loss, trained
from edgecomp.errors import ModelError
from edgecomp.spec import Candidate, Data


@dataclass(frozen=True)
class Distill(Training):
    """Train the candidate as a student of the float original (Hinton, Vinyals and Dean 2015, section 2).

    loss = (1 - alpha) * task_loss + alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)),
    with T = `temperature`; T^2 keeps the gradients' size the same when T changes. `alpha` 1 needs no labels.
    Raises ModelError when there is no teacher or when its outputs have another shape than the student's.
    """

    temperature: float = 4.0
    alpha: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check("temperature", self.temperature, self.temperature > 0, "a positive number")
        check("alpha", self.alpha, 0 <= self.alpha <= 1, "a weight from 0 (labels only) to 1 (teacher only)")

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        teacher = _teacher(candidate)

        def objective(module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
            student = first_output(module, inputs)
            with torch.no_grad():
                soft = first_output(teacher, inputs)
            loss = self.alpha * logit_loss(student, soft, self.temperature)
            if self.alpha < 1:
                loss = loss + (1 - self.alpha) * task_loss(student, targets, self.label_smoothing)
            return loss

        return trained(candidate, data, self, objective, name="distill")


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of softened logits [..., classes], the mean over all rows; a scalar."""
    if student.shape != teacher.shape:
        raise ModelError(
            f"the student gives {tuple(student.shape)}, the teacher {tuple(teacher.shape)}; logits must have "
            "one shape: give a teacher of the same classes"
        )
    classes = student.shape[-1]
    p = F.log_softmax(teacher.reshape(-1, classes) / temperature, dim=-1)
    q = F.log_softmax(student.reshape(-1, classes) / temperature, dim=-1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def _teacher(candidate: Candidate) -> Any:
    if candidate.original is None:
        raise ModelError(
            "step 'distill' needs a teacher, and the candidate carries no float original; start from a "
            "recipe or give --teacher"
        )
    return candidate.original.eval()
