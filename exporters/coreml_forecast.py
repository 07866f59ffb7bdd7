"""Which weights a Core ML package will hold in compressed form, told from the graph.

Core ML's targets compress weights alone: what is computed is float16 whatever they are. `runs` is `integer`
for a weight that is stored as indices or integers.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.fx import Node

from edgecomp.exporters.coreml import CoreMLExporter
from edgecomp.graph import constants
from edgecomp.spec import Candidate, Forecast

aten = torch.ops.aten

# Operation of the graph -> MIL operation, and the argument that is its weight.
_WEIGHTED = {
    aten.conv1d.default: ("conv", 1),
    aten.conv2d.default: ("conv", 1),
    aten.conv_transpose2d.input: ("conv_transpose", 1),
    aten.linear.default: ("linear", 1),
    aten.embedding.default: ("gather", 0),
}
_FLOAT = ("coreml-fp16", "coreml-fp32")


def forecast(candidate: Candidate, target: str) -> list[Forecast]:
    """One row for each weighted operation of `candidate.module`, a captured graph, in order."""
    exporter = CoreMLExporter(target)
    count: Counter[str] = Counter()
    found = []
    for node in candidate.module.graph.nodes:
        kind, at = _WEIGHTED.get(node.target, ("", 0))
        if not kind or not constants.is_constant(node.args[at]):
            continue
        weight = constants.value_of(candidate.module, node.args[at])
        label = f"{kind} {'x'.join(map(str, weight.shape))}"
        count[label] += 1
        why = _kept(exporter, target, node, weight)
        module = node.meta.get("module", "")
        runs = "float" if why else "integer"
        found.append(Forecast(f"{label} #{count[label]}", kind, module, runs, why, node.name))
    return found


def _kept(exporter: CoreMLExporter, target: str, node: Node, weight: torch.Tensor) -> str:
    """Why a weight stays float16; "" when it is compressed."""
    if target in _FLOAT:
        return "the target keeps weights in float"
    if weight.numel() < exporter.min_elements:
        return f"{weight.numel()} weights; at least {exporter.min_elements} are needed for a palette to pay"
    depthwise = "conv" in str(node.target) and weight.dim() > 2 and weight.shape[1] == 1
    if depthwise and target.startswith("coreml-pal") and exporter.depthwise == "float":
        return "depthwise convolutions stay float by the setting depthwise"
    return ""
