"""How much a channel matters: one score for each unit of a group, from its weights or their gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp.compress.prune_groups import Group
from edgecomp.compress.train import first_output, task_loss, tensors
from edgecomp.errors import DataError, RecipeError
from edgecomp.spec import DataSource

Criterion = Literal["l1", "l2", "bn_scale", "taylor", "random"]
CRITERIA = ("l1", "l2", "bn_scale", "taylor", "random")


def element_scores(
    module: nn.Module, criterion: Criterion, source: DataSource | None, samples: int
) -> dict[str, Tensor]:
    """Name -> score of every single weight, in the parameter's shape; a unit's score is their sum.

    l1: |w| (Li et al. 2017). l2: w^2; a sum over everything coupled is DepGraph's group norm (Fang et al.
    2023, eq. 4). taylor: the mean over batches of (w * dLoss/dw)^2 (Molchanov et al. 2019, eq. 8).
    bn_scale: |gamma| (Liu et al. 2017), on batch-norm scales only.
    """
    parameters = dict(module.named_parameters())
    if criterion == "taylor":
        return _taylor(module, source, samples)
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


def _taylor(module: nn.Module, source: DataSource | None, samples: int) -> dict[str, Tensor]:
    if source is None:
        raise DataError("criterion taylor needs labelled training data: give the recipe `data: train:`")
    scored = copy.deepcopy(module).eval()
    for parameter in scored.parameters():
        parameter.requires_grad_(True)
    total = {n: torch.zeros_like(p) for n, p in scored.named_parameters()}
    seen, batches = 0, 0
    for batch in source.batches(32):
        inputs, targets = tensors(batch)
        scored.zero_grad(set_to_none=True)
        task_loss(first_output(scored, inputs), targets).backward()
        for name, parameter in scored.named_parameters():
            if parameter.grad is not None:
                total[name] += (parameter.detach() * parameter.grad) ** 2
        seen, batches = seen + len(batch), batches + 1
        if seen >= samples:
            break
    if batches == 0:
        raise DataError("criterion taylor needs labelled training data, and the source is empty")
    return {name: value / batches for name, value in total.items()}
