"""Which node is computed inside another, so that its result is rounded once only."""

from __future__ import annotations

from torch.fx import Graph, Node

from edgecomp.graph.vocabulary import FUSED_ACTIVATIONS, FUSING


def fused_into(graph: Graph) -> dict[str, str]:
    """Producer -> activation that is computed in the same kernel, by node name.

    `{"conv2d": "relu6"}`: the convolution's only user is the activation, so no scale is kept between them.
    """
    return {
        node.name: next(iter(node.users)).name
        for node in graph.nodes
        if node.target in FUSING and len(node.users) == 1 and _is_activation(next(iter(node.users)))
    }


def _is_activation(node: Node) -> bool:
    return node.op == "call_function" and node.target in FUSED_ACTIVATIONS
