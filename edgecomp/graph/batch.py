"""A canonical graph is captured for batch 1; calibration and training want more samples at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from edgecomp.graph import constants

aten = torch.ops.aten


def with_batch(graph_module: GraphModule, size: int) -> GraphModule | None:
    """The same graph for `size` samples, sharing its parameters, or None where shapes do not allow it.

    Sizes written in reshape and expand are scaled in the dimension that holds the batch; a constant that
    is concatenated to a batch is repeated. Checked by shape: the output must have `size` times the rows.
    """
    memo = {id(t): t for t in (*graph_module.parameters(), *graph_module.buffers())}
    batched = copy.deepcopy(graph_module, memo)
    try:
        _propagate(batched, size)
    except (RuntimeError, ValueError, IndexError):
        return None
    batched.recompile()
    before, after = _output_shapes(graph_module), _output_shapes(batched)
    return (
        batched
        if all(a[0] == size * b[0] and a[1:] == b[1:] for a, b in zip(after, before, strict=True))
        else None
    )


def _output_shapes(graph_module: GraphModule) -> list[torch.Size]:
    outputs = graph_module.graph.find_nodes(op="output")[0].all_input_nodes
    return [n.meta["val"].shape for n in outputs]


def _propagate(graph_module: GraphModule, size: int) -> None:
    """Recompute every shape for the larger batch, mending the sizes that were written as numbers."""
    shapes: dict[Node, Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for node in graph_module.graph.nodes:
            if node.op == "placeholder":
                old = node.meta["val"]
                shapes[node] = torch.empty([old.shape[0] * size, *old.shape[1:]], dtype=old.dtype)
            elif node.op == "get_attr":
                shapes[node] = torch.empty_like(constants.value_of(graph_module, node))
            elif node.op == "call_function":
                _mend(graph_module, node, shapes, size)
                arguments = map_arg(node.args, lambda n: shapes[n])
                keywords = map_arg(node.kwargs, lambda n: shapes[n])
                shapes[node] = node.target(*arguments, **keywords)
    for node, fake in shapes.items():
        if node.op != "get_attr":
            node.meta["val"] = fake


def _mend(graph_module: GraphModule, node: Node, shapes: dict[Node, Tensor], size: int) -> None:
    if node.target is aten.reshape.default:
        source = node.args[0]
        node.update_arg(1, _scaled(source.meta["val"].shape, shapes[source].shape, list(node.args[1]), size))
    elif node.target is aten.expand.default:
        actual, target = shapes[node.args[0]].shape, list(node.args[1])
        offset = len(target) - len(actual)
        sizes = [t if i < offset or actual[i - offset] == 1 else -1 for i, t in enumerate(target)]
        node.update_arg(1, sizes)
    elif node.target is aten.cat.default:
        _repeat_constants(graph_module, node, shapes, size)


def _scaled(old: Sequence[int], actual: Sequence[int], target: list[int], size: int) -> list[int]:
    """The target sizes with the batch's factor put where it goes: after the same number of elements."""
    if -1 in target or prod(actual) == prod(target):
        return target
    dimension = next(i for i, (a, o) in enumerate(zip(actual, old, strict=True)) if a == o * size)
    before = prod(old[:dimension])
    place = next(i for i in range(len(target)) if prod(target[:i]) == before)
    return [t * size if i == place else t for i, t in enumerate(target)]


def _repeat_constants(graph_module: GraphModule, node: Node, shapes: dict[Node, Tensor], size: int) -> None:
    parts: list[Node] = list(node.args[0])
    rows = max(shapes[p].shape[0] for p in parts)
    for index, part in enumerate(parts):
        if constants.is_constant(part) and shapes[part].shape[0] != rows:
            value = constants.value_of(graph_module, part)
            with unset_fake_temporarily():
                whole = value.repeat(rows, *[1] * (value.dim() - 1))
                repeated = constants.add(graph_module, f"{part.name}_batch", whole, node)
            shapes[repeated] = torch.empty(rows, *value.shape[1:], dtype=value.dtype)
            parts[index] = repeated
    node.update_arg(0, parts)
