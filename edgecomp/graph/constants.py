"""Constants of a graph: reading, adding and replacing what `get_attr` nodes point at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node


def value_of(graph_module: GraphModule, node: Node) -> Tensor:
    """The tensor that a `get_attr` node points at."""
    target: object = graph_module
    for part in str(node.target).split("."):
        target = getattr(target, part)
    if not isinstance(target, Tensor):
        raise TypeError(f"get_attr {node.target} is a {type(target).__name__}, not a tensor")
    return target


def add(graph_module: GraphModule, name: str, value: Tensor, before: Node) -> Node:
    """Register a buffer under a free name and give a `get_attr` node for it, placed before `before`."""
    free = name.replace(".", "_")
    count = 0
    while hasattr(graph_module, free):
        count += 1
        free = f"{name.replace('.', '_')}_{count}"
    graph_module.register_buffer(free, value.detach().clone().contiguous())
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.get_attr(free)
    node.meta = {"val": value, "module": before.meta.get("module", "")}
    return node


def replace(graph_module: GraphModule, node: Node, value: Tensor) -> None:
    """Point one `get_attr` node at a new tensor; other nodes that share the old one keep it."""
    fresh = add(graph_module, node.name + "_folded", value, node)
    node.replace_all_uses_with(fresh)
    graph_module.graph.erase_node(node)


def is_constant(node: object) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def scalar(value: float, like: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=like)
