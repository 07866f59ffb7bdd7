"""The rungs above the artifact: was the graph folded rightly, and is the plan a sound one?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from edgecomp.graph import constants
from edgecomp.graph.interpret import watch
from edgecomp.graph.vocabulary import WEIGHTED
from edgecomp.ladder_local import op_name, samples_of
from edgecomp.numerics import affine, metrics
from edgecomp.numerics.saturation import x86_pair_risk
from edgecomp.reference import flatten
from edgecomp.spec import Batch, QuantizationPlan, TensorQuantization

# A folded convolution equals the output of some module of the original to float32 precision.
FOLDED_DB = 60.0
# Mended biases move the float graph away from the original by no more than this.
MENDED_DB = 30.0
# A weight that is the original's, up to float32 rounding of the fold.
SAME_WEIGHT_DB = 40.0
# Weights may be this much worse than rounding each channel to its own scale (learned rounding costs up to 6).
WEIGHT_SLACK_DB = 8.0
# Activations that lose more than this by rounding to the plan have a wrong range.
ACTIVATION_DB = 12.0


def fold_errors(
    original: nn.Module, graph_module: GraphModule, batches: Sequence[Batch]
) -> list[dict[str, Any]]:
    """For each weighted node of the folded graph, the module output of the original that it equals best.

    `node`, `module`, `sqnr_db`; nodes whose result no module of the same shape gives are left out of doubt.
    """
    inputs = next(samples_of(batches))
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in inputs]
    seen = module_outputs(original, tensors)
    values: dict[str, np.ndarray] = {}
    weighted = frozenset(n.name for n in graph_module.graph.nodes if n.target in WEIGHTED)
    watch(graph_module, tensors, lambda n, v: values.update({n.name: v.numpy().copy()}), weighted)
    modules = {n.name: n.meta.get("module", "") for n in graph_module.graph.nodes}
    found = []
    for name, value in values.items():
        same = [o for o in seen if o.shape == value.shape]
        if same:
            best = max(metrics.sqnr_db(o, value) for o in same)
            found.append({"node": name, "module": modules[name], "sqnr_db": best})
    return found


def changed_weights(fresh: GraphModule, graph: GraphModule) -> list[dict[str, Any]]:
    """Layers of a graph whose weights are not those of a fresh capture: `node`, `module`, `sqnr_db`."""
    found = []
    known = {n.name: n for n in fresh.graph.nodes}
    for node in graph.graph.nodes:
        other = known.get(node.name)
        if node.target not in WEIGHTED or other is None or other.target is not node.target:
            continue
        if not (constants.is_constant(node.args[1]) and constants.is_constant(other.args[1])):
            continue
        ours = constants.value_of(graph, node.args[1]).detach().numpy()
        theirs = constants.value_of(fresh, other.args[1]).detach().numpy()
        if ours.shape != theirs.shape:
            continue
        sqnr = metrics.sqnr_db(theirs, ours)
        if sqnr < SAME_WEIGHT_DB:
            found.append({"node": node.name, "module": node.meta.get("module", ""), "sqnr_db": sqnr})
    return found


def module_outputs(module: nn.Module, inputs: Sequence[Tensor]) -> list[np.ndarray]:
    """Outputs of every leaf module, in order of execution."""
    seen: list[np.ndarray] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor | tuple | list):
            seen.extend(t.detach().numpy().copy() for t in flatten(output))

    handles = [m.register_forward_hook(keep) for m in module.modules() if not list(m.children())]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def weight_errors(graph_module: GraphModule, plan: QuantizationPlan) -> list[dict[str, Any]]:
    """SQNR of each layer's integers against its float weights, and what one scale a channel would reach."""
    found = []
    for node in graph_module.graph.nodes:
        if node.target not in WEIGHTED or not constants.is_constant(node.args[1]):
            continue
        quantization = plan.weights.get(str(node.args[1].target))
        if quantization is None or quantization.values is None:
            continue
        weight = constants.value_of(graph_module, node.args[1]).numpy()
        sqnr = metrics.sqnr_db(weight, affine.dequantize(quantization.values, quantization))
        found.append(
            {
                "node": node.name,
                "module": node.meta.get("module", ""),
                "sqnr_db": sqnr,
                "reachable_db": reachable_db(weight, quantization, WEIGHTED[node.target]),
                "x86_saturation": x86_pair_risk(quantization.values, WEIGHTED[node.target]),
            }
        )
    return found


def reachable_db(weight: np.ndarray, quantization: TensorQuantization, axis: int) -> float:
    """SQNR of rounding to nearest with a symmetric scale for each channel (or group), same bits."""
    top = 2 ** (quantization.spec.bits - 1) - 1
    rows = np.moveaxis(weight.astype(np.float64), axis, 0).reshape(weight.shape[axis], -1)
    size = quantization.spec.group_size
    if size and rows.shape[1] % size == 0:
        rows = rows.reshape(-1, size)
    scale = np.abs(rows).max(axis=1, keepdims=True) / top
    scale = np.where(scale == 0, 1.0, scale)
    return metrics.sqnr_db(rows, np.clip(np.rint(rows / scale), -top, top) * scale)


def activation_errors(
    graph_module: GraphModule, plan: QuantizationPlan, batches: Sequence[Batch]
) -> list[dict[str, Any]]:
    """SQNR of each activation rounded to the plan, on the float graph: rounding and clipping alone."""
    energy: dict[str, list[float]] = {}

    def tally(node: Node, value: Tensor) -> None:
        quantization = plan.activations[node.name]
        x = value.numpy().astype(np.float64)
        back = affine.dequantize(affine.quantize(value.numpy(), quantization), quantization)
        sums = energy.setdefault(node.name, [0.0, 0.0])
        sums[0] += float(np.sum(x * x))
        sums[1] += float(np.sum((x - back) ** 2))

    names = frozenset(plan.activations)
    for inputs in samples_of(batches):
        watch(graph_module, [torch.from_numpy(np.ascontiguousarray(a)) for a in inputs], tally, names)
    nodes = {n.name: n for n in graph_module.graph.nodes}
    return [
        {
            "node": name,
            "module": nodes[name].meta.get("module", ""),
            "op": op_name(nodes[name]),
            "sqnr_db": metrics.ratio_db(*energy[name]),
        }
        for name in nodes
        if name in energy
    ]
