"""Activations of a Core ML program in 8 bits: the plan's scales as pairs of quantize and dequantize.

coremltools calibrates activations by running the model, which it does on a Mac only; here the plan was made
before. Apple's compiler computes an operation in integers where its inputs come from such pairs and its
weight is int8 (A17 Pro and M4 on, by Apple's guide "Quantization Overview"); elsewhere the pairs round.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.spec import Candidate, Problem, QuantizationPlan, TensorQuantization

aten = torch.ops.aten

_MOVES = {
    aten.reshape.default, aten.permute.default, aten.slice.Tensor, aten.select.int, aten.expand.default,
    aten.max_pool2d.default, aten.amax.default, aten.amin.default, aten.flip.default, aten.roll.default,
}  # fmt: skip
"""Operations whose results are among their inputs: on the same scale a second rounding changes nothing."""


def needed(candidate: Candidate, target: str) -> list[Problem]:
    """[] where the candidate's plan has ranges of activations, else what is missing."""
    if candidate.quantization is not None and candidate.quantization.activations:
        return []
    reason = f"{target} with activations: int8 needs a quantized candidate; add a quantize step or --calib"
    return [Problem("quantize", "", reason)]


def rounded(graph_module: GraphModule, plan: QuantizationPlan, notes: list[Problem]) -> GraphModule:
    """A copy of the canonical graph that rounds each value of 8 bits as the plan says; weights stay float.

    Values of 16 bits stay float, for Core ML has no such integers, and are noted.
    """
    kept: dict[str, TensorQuantization] = {}
    for node in graph_module.graph.nodes:
        found = plan.activations.get(node.name)
        if found is None or _is_there_already(node, found, plan):
            continue
        if found.spec.bits == 8:
            kept[node.name] = found
        else:
            where = node.meta.get("module") or node.name
            notes.append(Problem(str(node.target), where, f"{node.name} stays float: Core ML has no int16"))
    return fake_quantize(graph_module, QuantizationPlan(kept, {}, plan.float_nodes))


def _is_there_already(node: Node, found: TensorQuantization, plan: QuantizationPlan) -> bool:
    if node.target not in _MOVES or not isinstance(node.args[0], Node):
        return False
    before = plan.activations.get(node.args[0].name)
    if before is None or before.spec != found.spec:
        return False
    return float(before.scale) == float(found.scale) and int(before.zero_point) == int(found.zero_point)
