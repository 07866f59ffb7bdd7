"""How much a channel matters: one score for each unit of a group, from its weights or their gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp.compress.prune_groups import Group
from edgecomp.compress.train import first_output, task_loss, tensors
from edgecomp.errors import DataError, RecipeError
from edgecomp.spec import DataSource

Criterion = Literal["l1", "l2", "bn_scale", "taylor", "fisher", "hessian", "random"]
CRITERIA = ("l1", "l2", "bn_scale", "taylor", "fisher", "hessian", "random")


def element_scores(
    module: nn.Module, criterion: Criterion, source: DataSource | None, samples: int
) -> dict[str, Tensor]:
    """Name -> score of every single weight, in the parameter's shape; a unit's score is their sum.

    l1: |w| (Li et al. 2017). l2: w^2; a sum over everything coupled is DepGraph's group norm (Fang et al.
    2023, eq. 4). taylor: the mean over batches of (w * dLoss/dw)^2 (Molchanov et al. 2019, eq. 8).
    fisher: w^2 / 2 * the mean over samples of (dLoss/dw)^2 (Theis et al. 2018, eq. 9). hessian: w^2 / 2 * the
    diagonal of the loss's Hessian (LeCun et al. 1990, eq. 4), estimated by Hutchinson's z * Hz with signs z
    (Bekas et al. 2007), one draw a batch; its absolute value, as a net that is not at a minimum has negative
    ones. bn_scale: |gamma| (Liu et al. 2017), on batch-norm scales only.
    """
    parameters = dict(module.named_parameters())
    if criterion in _OF_LOSS:
        return _of_loss(module, criterion, source, samples)
    if criterion == "l2":
        return {n: p.detach() ** 2 for n, p in parameters.items()}
    return {n: p.detach().abs() for n, p in parameters.items()}


def unit_scores(
    group: Group, elements: Mapping[str, Tensor], criterion: Criterion, generator: np.random.Generator
) -> np.ndarray:
    """Scores [len(group)], divided by their mean so that groups can be compared. Raises RecipeError."""
    if criterion == "random":
        return generator.random(len(group)) + 0.5
    if criterion == "bn_scale":
        places = [(name, 0) for name in group.scales]
        if not places:
            raise RecipeError(
                f"criterion bn_scale needs a batch normalization after {group.name!r}, which has none; use "
                "criterion l1 or l2, or exclude the layer"
            )
    else:
        places = [p for p in group.members[0] if p[0] in elements and elements[p[0]].ndim > 1]
    scores = np.zeros(len(group))
    for name, axis in places:
        element = elements[name]
        others = [a for a in range(element.ndim) if a != axis]
        along = (element.sum(dim=others) if others else element).double().numpy()
        scores += np.array([along[list(m[(name, axis)])].sum() for m in group.members])
    mean = scores.mean()
    return scores / mean if mean > 0 else np.ones(len(group))


def _of_loss(module: nn.Module, criterion: str, source: DataSource | None, samples: int) -> dict[str, Tensor]:
    """The mean over batches of what the criterion says of one batch's loss."""
    if source is None:
        raise DataError(f"criterion {criterion} needs labelled training data: give the recipe `data: train:`")
    scored = copy.deepcopy(module).eval()
    for parameter in scored.parameters():
        parameter.requires_grad_(True)
    parameters = dict(scored.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    seen, batches = 0, 0
    for batch in source.batches(1 if criterion == "fisher" else 32):
        inputs, targets = tensors(batch)
        loss = task_loss(first_output(scored, inputs), targets)
        for name, value in _OF_LOSS[criterion](loss, parameters, generator).items():
            total[name] += value
        seen, batches = seen + len(batch), batches + 1
        if seen >= samples:
            break
    if batches == 0:
        raise DataError(f"criterion {criterion} needs labelled training data, and the source is empty")
    return {name: (value / batches).abs() for name, value in total.items()}


def _gradients(loss: Tensor, parameters: Mapping[str, Tensor], again: bool = False) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), create_graph=again, allow_unused=True)
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


def _taylor(loss: Tensor, parameters: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    return {n: (parameters[n].detach() * g) ** 2 for n, g in _gradients(loss, parameters).items()}


def _fisher(loss: Tensor, parameters: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    return {n: 0.5 * parameters[n].detach() ** 2 * g**2 for n, g in _gradients(loss, parameters).items()}


def _hessian(loss: Tensor, parameters: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    first = {n: g for n, g in _gradients(loss, parameters, again=True).items() if g.requires_grad}
    signs = {n: torch.randint(0, 2, g.shape, generator=generator) * 2.0 - 1.0 for n, g in first.items()}
    along = torch.stack([(g * signs[n]).sum() for n, g in first.items()]).sum()
    curved = _gradients(along, {n: parameters[n] for n in first})
    return {n: 0.5 * parameters[n].detach() ** 2 * signs[n] * h for n, h in curved.items()}


_OF_LOSS: dict[str, Callable[[Tensor, Mapping[str, Tensor], torch.Generator], dict[str, Tensor]]] = {
    "taylor": _taylor,
    "fisher": _fisher,
    "hessian": _hessian,
}
