"""Losses between a student and a teacher; each is a scalar, the mean over samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgecomp.errors import ModelError


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of softened logits [..., classes] (Hinton et al. 2015, section 2)."""
    q, p = _softened(student, teacher, temperature)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def reverse_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(student || teacher): the student keeps to what the teacher finds likely (Gu et al. 2024)."""
    q, p = _softened(student, teacher, temperature)
    return F.kl_div(p, q, reduction="batchmean", log_target=True) * temperature**2


def decoupled_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    temperature: float,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled distillation of logits [N, classes] (Zhao et al. 2022, eq. 7).

    alpha * KL of (target, rest) + beta * KL among the other classes, times T^2; alpha 1 and beta 8 are the
    paper's values for CIFAR-100.
    """
    q, p = _softened(student, teacher, temperature)
    mask = F.one_hot(targets.reshape(-1), q.shape[1]).bool()
    target_q, target_p = (torch.stack([x[mask], _rest(x, mask)], dim=1) for x in (q, p))
    target = F.kl_div(target_q, target_p, reduction="batchmean", log_target=True)
    others_q, others_p = (x.masked_fill(mask, -1e9).log_softmax(dim=1) for x in (q, p))
    spread = (others_p.exp() * (others_p - others_q)).masked_fill(mask, 0.0).sum(dim=1).mean()
    return (alpha * target + beta * spread) * temperature**2


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of features of one shape (FitNets, Romero et al. 2015, eq. 3)."""
    _same_shape(student, teacher, "outputs")
    return F.mse_loss(student, teacher)


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of every vector [..., width] with the teacher's; a vector of zeros counts as 1."""
    _same_shape(student, teacher, "outputs")
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of normalized attention maps of [N, C, H, W] (Zagoruyko and Komodakis 2017, eq. 2).

    The map is the sum over channels of squares; channel counts may differ, H and W must not. Features of
    [N, L, C] give a map over L.
    """
    s, t = _attention_map(student), _attention_map(teacher)
    _same_shape(s, t, "attention maps")
    return ((s - t) ** 2).sum(dim=1).mean()


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the batch's pairwise distances over their mean (RKD-D, Park et al. 2019, eq. 4).

    One sample alone has no distance to another: the loss is 0.
    """
    if len(student) < 2:
        return (student * 0.0).sum()
    distances = []
    for features in (student, teacher):
        flat = features.reshape(len(features), -1)
        pairs = torch.pdist(flat.float())
        distances.append(pairs / pairs.mean().clamp_min(1e-12))
    return F.smooth_l1_loss(distances[0], distances[1])


def _softened(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [rows, classes] of both at this temperature."""
    _same_shape(student, teacher, "logits")
    classes = student.shape[-1]
    return (
        F.log_softmax(student.reshape(-1, classes) / temperature, dim=-1),
        F.log_softmax(teacher.reshape(-1, classes) / temperature, dim=-1),
    )


def _rest(log_probabilities: Tensor, mask: Tensor) -> Tensor:
    return log_probabilities.masked_fill(mask, -1e9).logsumexp(dim=1)


def _attention_map(features: Tensor) -> Tensor:
    axis = 2 if features.ndim == 3 else 1
    return F.normalize((features**2).sum(dim=axis).reshape(len(features), -1), dim=1)


def _same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise ModelError(
            f"{what} of the student have shape {tuple(student.shape)}, of the teacher "
            f"{tuple(teacher.shape)}; they must have one shape: choose other layers or another teacher"
        )
