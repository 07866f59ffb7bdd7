"""Mean squares of normalization layers, computed so that integers hold them.

Layer and RMS normalization divide by the root of a mean of squares. Squares span twice the orders of
magnitude of their values: one outlier of 220 among values of 0.5 leaves 8-bit squares steps of 190, and even
16-bit ones steps of 1.5, so that most squares become 0 before they are averaged. As a product of the vector
with itself they are added in the accumulator, which is exact, and rounded once.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgecomp.graph import constants

aten = torch.ops.aten


def accumulate_squares(graph_module: GraphModule) -> int:
    """Write `mean(x * x)` over trailing axes as `(x . x) / n`, in place; returns how many there were.

    >>> # [1, 64, 384]: reshape to [1, 64, 1, 384] and [1, 64, 384, 1], their matmul [1, 64, 1, 1],
    >>> # reshape to [1, 64, 1], times 1 / 384.
    """
    found = [n for n in graph_module.graph.nodes if _squared(n) is not None]
    for mean in found:
        _rewrite(graph_module, mean)
    if found:
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
    return len(found)


def _squared(node: Node) -> Node | None:
    """The value whose squares a node averages over its last axes, where nothing else reads the squares."""
    if node.target is not aten.mean.dim or len(node.args) < 2 or not isinstance(node.args[0], Node):
        return None
    product = node.args[0]
    if (
        product.target is not aten.mul.Tensor
        or len(product.users) > 1
        or product.args[0] is not product.args[1]
    ):
        return None
    rank = product.meta["val"].dim()
    axes = sorted(int(d) % rank for d in node.args[1])
    trailing = axes == list(range(rank - len(axes), rank)) and 0 < len(axes) < rank
    return product.args[0] if trailing else None


def _rewrite(graph_module: GraphModule, mean: Node) -> None:
    x = _squared(mean)
    if x is None:
        return
    shape, kept = list(x.meta["val"].shape), list(mean.meta["val"].shape)
    outer = shape[: len(shape) - len(mean.args[1])]
    count = prod(shape[len(outer) :])
    row = _call(mean, aten.reshape.default, (x, [*outer, 1, count]))
    column = _call(mean, aten.reshape.default, (x, [*outer, count, 1]))
    total = _call(mean, aten.reshape.default, (_call(mean, aten.matmul.default, (row, column)), kept))
    share = constants.add(graph_module, f"{mean.name}_share", constants.scalar(1.0 / count), mean)
    mean.replace_all_uses_with(_call(mean, aten.mul.Tensor, (total, share)))


def _call(before: Node, target: Any, arguments: tuple[Any, ...]) -> Node:
    """A new operation with its shape, in the module of the one before which it is put."""
    with before.graph.inserting_before(before):
        made = before.graph.call_function(target, arguments)
    with torch.no_grad():
        values = [a.meta["val"] if isinstance(a, Node) else a for a in arguments]
        found: Tensor = target(*values)
    made.meta = {"val": found, "module": before.meta.get("module", "")}
    return made
