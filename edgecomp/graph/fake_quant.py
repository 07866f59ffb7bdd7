"""The fake-quantized graph: what the artifacts compute, written in torch.

Every value that the plan names is rounded to its scale and brought back to float; weights are their
integers times their scale; biases are rounded to int32 steps. Accumulation is float32, which holds
int8 products exactly up to 2^24 steps.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgecomp.graph import constants
from edgecomp.graph.vocabulary import WEIGHTED
from edgecomp.numerics import affine
from edgecomp.spec import QuantizationPlan, TensorQuantization


def fake_quantize(graph_module: GraphModule, plan: QuantizationPlan) -> GraphModule:
    """A copy of the canonical graph that rounds as the plan says. Nothing of the original is changed."""
    result = copy.deepcopy(graph_module)
    for node in list(result.graph.nodes):
        if node.target in WEIGHTED and node.name not in plan.float_nodes:
            _round_weight_and_bias(result, node, plan)
        elif node.target is torch.ops.aten.embedding.default and node.name not in plan.float_nodes:
            _round_table(result, node, plan)
    for node in list(result.graph.nodes):
        if node.name in plan.activations:
            _round_output(result, node, plan.activations[node.name])
    result.graph.eliminate_dead_code()
    result.recompile()
    return result


def _round_weight_and_bias(graph_module: GraphModule, layer: Node, plan: QuantizationPlan) -> None:
    weight = plan.weights.get(str(layer.args[1].target)) if constants.is_constant(layer.args[1]) else None
    if weight is None or weight.values is None:
        return
    restored = torch.from_numpy(affine.dequantize(weight.values, weight))
    layer.update_arg(1, constants.add(graph_module, f"{layer.name}_weight", restored, layer))
    source = plan.activations.get(layer.args[0].name)
    if len(layer.args) > 2 and isinstance(layer.args[2], Node) and source is not None:
        bias = constants.value_of(graph_module, layer.args[2]).numpy()
        rounded = torch.from_numpy(round_bias(bias, source, weight))
        layer.update_arg(2, constants.add(graph_module, f"{layer.name}_bias", rounded, layer))


def _round_table(graph_module: GraphModule, node: Node, plan: QuantizationPlan) -> None:
    """The rows of an embedding that is stored as integers."""
    table = plan.weights.get(str(node.args[0].target)) if constants.is_constant(node.args[0]) else None
    if table is not None and table.values is not None:
        restored = torch.from_numpy(affine.dequantize(table.values, table))
        node.update_arg(0, constants.add(graph_module, f"{node.name}_weight", restored, node))


def round_bias(bias: np.ndarray, source: TensorQuantization, weight: TensorQuantization) -> np.ndarray:
    """The float32 bias that an int32 bias with scale input * weight stands for."""
    integers = affine.quantize_bias(bias, source.scale, weight.scale)
    return (integers * (source.scale.astype(np.float64) * weight.scale.astype(np.float64))).astype(np.float32)


def _round_output(graph_module: GraphModule, node: Node, q: TensorQuantization) -> None:
    if node.op == "get_attr":
        value = constants.value_of(graph_module, node).numpy()
        constants.replace(
            graph_module, node, torch.as_tensor(affine.dequantize(affine.quantize(value, q), q))
        )
        return
    users = list(node.users)
    with graph_module.graph.inserting_after(node):
        rounded = graph_module.graph.call_function(
            torch.fake_quantize_per_tensor_affine,
            (node, float(q.scale), int(q.zero_point), q.spec.qmin, q.spec.qmax),
        )
    rounded.meta = {"val": node.meta["val"], "module": node.meta.get("module", "")}
    for user in users:
        user.replace_input_with(node, rounded)


def to_integers(value: Tensor, q: TensorQuantization) -> np.ndarray:
    """The integers that a rounded activation stands for."""
    return affine.quantize(value.detach().numpy(), q)
