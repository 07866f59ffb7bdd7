"""A canonical graph as plain data (lists, strings, numbers, tensors), and back.

`torch.load(weights_only=True)` reads the result, no code of the user's is needed, and node names stay what
they were, so a quantization plan still fits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from edgecomp.errors import ModelError
from edgecomp.graph import clean

_ENUMS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def to_plain(module: GraphModule) -> dict[str, Any]:
    """`nodes`: one dict for each node in order; `constants`: get_attr target -> tensor."""
    nodes, constants = [], {}
    for node in module.graph.nodes:
        target = node.target if isinstance(node.target, str) else str(node.target)
        nodes.append(
            {
                "op": node.op,
                "name": node.name,
                "target": target,
                "args": _encode(node.args),
                "kwargs": _encode(dict(node.kwargs)),
                "module": node.meta.get("module", ""),
            }
        )
        if node.op == "get_attr":
            constants[target] = _attribute(module, target).detach().clone()
    return {"nodes": nodes, "constants": constants}


def from_plain(facts: dict[str, Any], inputs: tuple[Tensor, ...]) -> GraphModule:
    """The graph module again, shapes refreshed for example `inputs`. Raises ModelError when damaged."""
    root = nn.Module()
    for name, tensor in facts["constants"].items():
        _attach(root, name, tensor)
    graph = Graph()
    made: dict[str, Node] = {}
    for record in facts["nodes"]:
        target = record["target"]
        if record["op"] == "call_function":
            target = _overload(target)
        args, kwargs = _decode(record["args"], made), _decode(record["kwargs"], made)
        node = graph.create_node(record["op"], target, tuple(args), kwargs, name=record["name"])
        if node.name != record["name"]:
            raise ModelError(f"the checkpoint's graph has two nodes named {record['name']!r}; quantize again")
        node.meta["module"] = record["module"]
        made[node.name] = node
    module = GraphModule(root, graph)
    module.meta["canonical"] = True
    clean.refresh_shapes(module, inputs)
    return module


def _encode(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {"map": {k: _encode(v) for k, v in value.items()}}
    for name, kind in _ENUMS.items():
        if isinstance(value, kind):
            return {"torch": str(value).removeprefix("torch."), "kind": name}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ModelError(f"a graph argument of type {type(value).__name__} cannot be stored: {value!r}")


def _decode(value: Any, made: dict[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, made) for v in value]
    if not isinstance(value, dict):
        return value
    if "node" in value:
        return made[value["node"]]
    if "map" in value:
        return {k: _decode(v, made) for k, v in value["map"].items()}
    if "torch" in value:
        return getattr(torch, value["torch"])
    return torch.device(value["device"])


def _overload(name: str) -> Any:
    """`aten.conv2d.default` -> torch.ops.aten.conv2d.default."""
    namespace, operation, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), operation), overload)


def _attribute(module: nn.Module, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _attach(root: nn.Module, path: str, tensor: Tensor) -> None:
    *owners, leaf = path.split(".")
    for name in owners:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.register_buffer(leaf, tensor)
