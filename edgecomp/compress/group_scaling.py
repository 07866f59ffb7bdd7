"""Scaling of input channels before rounding: important inputs get larger weights, and so finer steps.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression", MLSys 2024,
section 3.2: s = mean|x|^a, W' = W s, x' = x / s, the power a by search. Here the loss is the error on the
inputs' second moments. The division goes into what makes the input: the weight of a normalization
(`x * weight`), or the rows of a linear layer that the input is multiplied with (a gated unit).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgecomp.graph import constants
from edgecomp.numerics import group_gptq, groupwise
from edgecomp.numerics.groupwise import Grid

aten = torch.ops.aten

_POWERS = tuple(np.linspace(0.0, 1.0, 11))


@dataclass(frozen=True)
class Place:
    """Where a division of the input goes: a stored vector of a product, or the rows of a linear layer."""

    target: str
    rows: bool


def place_of(graph_module: GraphModule, source: Node, layers: list[Node]) -> Place | None:
    """Where the stage's input can be divided, or None: other readers, or nothing to divide before it."""
    if source.target is not aten.mul.Tensor or set(source.users) != set(layers):
        return None
    width = source.meta["val"].shape[-1]
    for side in source.args:
        if not isinstance(side, Node):
            continue
        if (
            constants.is_constant(side)
            and side.meta["val"].numel() == width
            and _only_use(graph_module, side)
        ):
            return Place(str(side.target), rows=False)
        is_linear = side.target is aten.linear.default and constants.is_constant(side.args[1])
        bias = side.args[2] if is_linear and len(side.args) > 2 else None
        if (
            is_linear
            and bias is None
            and set(side.users) == {source}
            and _only_use(graph_module, side.args[1])
        ):
            return Place(str(side.args[1].target), rows=True)
    return None


def _only_use(graph_module: GraphModule, constant: Node) -> bool:
    same = [n for n in graph_module.graph.find_nodes(op="get_attr") if n.target == constant.target]
    return sum(len(n.users) for n in same) == 1


def chosen(
    weights: list[np.ndarray], grids: list[Grid], hessian: np.ndarray, magnitude: np.ndarray
) -> np.ndarray:
    """The scale of every input [in] with the least error, summed over the stage's weights."""
    best, least = np.ones(len(magnitude), np.float32), np.inf
    base = np.maximum(magnitude, 1e-4 * magnitude.max() + 1e-12)
    for power in _POWERS:
        scale = (base**power).astype(np.float32)
        scale /= np.sqrt(scale.max() * scale.min())
        total = 0.0
        for weight, grid in zip(weights, grids, strict=True):
            scaled = weight * scale
            step, zero = groupwise.searched(scaled, grid)
            back = groupwise.restore(groupwise.round_to(scaled, step, zero, grid), step, zero) / scale
            total += float(group_gptq.error(back, weight, hessian).sum())
        if total < least:
            best, least = scale, total
    return best


def divide(graph_module: GraphModule, place: Place, scale: np.ndarray) -> Tensor:
    """Divide the stored vector, or the rows of the weight, in the graph; gives the new tensor."""
    owner, _, leaf = place.target.rpartition(".")
    holder = graph_module.get_submodule(owner)
    value = getattr(holder, leaf).detach()
    factors = torch.from_numpy(scale)
    divided = value / factors[:, None] if place.rows else value / factors.reshape(value.shape)
    set_constant(graph_module, place.target, divided)
    return divided


def set_constant(graph_module: GraphModule, target: str, value: Tensor) -> None:
    """Replace the tensor behind a `get_attr` target for all nodes that read it."""
    owner, _, leaf = target.rpartition(".")
    holder = graph_module.get_submodule(owner)
    if leaf in holder._parameters:
        holder._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    else:
        setattr(holder, leaf, value)
