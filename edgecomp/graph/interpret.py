"""Run a canonical graph node by node and hand every value to a callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

Visit = Callable[[Node, Tensor], None]


class _Watching(Interpreter):
    def __init__(self, graph_module: GraphModule, visit: Visit, wanted: frozenset[str]) -> None:
        super().__init__(graph_module)
        self._visit = visit
        self._wanted = wanted

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self._wanted:
            self._visit(n, result)
        return result


@torch.no_grad()
def watch(graph_module: GraphModule, inputs: Sequence[Tensor], visit: Visit, wanted: frozenset[str]) -> Any:
    """Run once; `visit(node, value)` for each node whose name is in `wanted`. Returns the outputs.

    Values are freed as soon as their last user has run, so memory is that of a plain forward pass.
    """
    return _Watching(graph_module, visit, wanted).run(*inputs)
