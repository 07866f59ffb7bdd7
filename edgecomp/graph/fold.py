"""Folding: what depends on constants only, and batch normalization into the layer before it.

Batch-norm folding: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, equation 14.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from edgecomp.graph import constants
from edgecomp.graph.clean import calls, spread
from edgecomp.graph.vocabulary import WEIGHTED

aten = torch.ops.aten

_RANDOM = {aten.rand.default, aten.randn.default, aten.randint.low, aten.bernoulli.default}
_LARGEST_FOLDED = 1 << 24
"""Elements of a folded constant; a larger one stays computed, so that a file does not grow by surprise."""


def constants_of(graph_module: GraphModule, node: Node) -> dict[Node, Tensor] | None:
    """The tensors of all inputs of a node, or None when one is not a constant."""
    if not all(constants.is_constant(n) for n in node.all_input_nodes):
        return None
    return {n: constants.value_of(graph_module, n) for n in node.all_input_nodes}


def fold_node(graph_module: GraphModule, node: Node) -> None:
    known = constants_of(graph_module, node)
    if known is None or node.target in _RANDOM:
        return
    arguments = map_arg(node.args, lambda n: known[n])
    keywords = map_arg(node.kwargs, lambda n: known[n])
    with torch.no_grad():
        result: Any = node.target(*arguments, **keywords)
    if not isinstance(result, Tensor) or result.numel() > _LARGEST_FOLDED:
        return
    folded = constants.add(graph_module, node.name, result, node)
    folded.meta["module"] = node.meta.get("module", "")
    node.replace_all_uses_with(folded)
    graph_module.graph.erase_node(node)


def fold_all(graph_module: GraphModule) -> None:
    """Replace every call whose inputs are all constants by its result."""
    for node in calls(graph_module):
        fold_node(graph_module, node)


def fold_batch_norms(graph_module: GraphModule) -> None:
    """Fold each batch normalization into the convolution or linear before it, else into mul and add."""
    for node in calls(graph_module):
        if node.target is aten._native_batch_norm_legit_no_training.default:
            for output in list(node.users):  # (normalized, saved mean, saved variance): the first is used
                _fold_batch_norm(graph_module, output, node.args)


def _fold_batch_norm(graph_module: GraphModule, node: Node, arguments: Sequence[Any]) -> None:
    x, weight, bias, mean, variance, _momentum, eps = arguments
    running = constants.value_of(graph_module, variance)
    centre = constants.value_of(graph_module, mean)
    scale = torch.rsqrt(running + eps)
    if weight is not None:
        scale = scale * constants.value_of(graph_module, weight)
    shift = -centre * scale
    if bias is not None:
        shift = shift + constants.value_of(graph_module, bias)
    if _takes_scale(x):
        _scale_layer(graph_module, x, scale, shift)
        node.replace_all_uses_with(x)
        graph_module.graph.erase_node(node)
    else:
        _multiply_and_add(graph_module, node, x, scale, shift)


def _takes_scale(layer: Node) -> bool:
    """A linear layer of more than two dimensions has its channels last; the normalization's are axis 1."""
    if layer.target is aten.linear.default and layer.meta["val"].dim() != 2:
        return False
    return layer.target in WEIGHTED and len(layer.users) == 1 and constants.is_constant(layer.args[1])


def _scale_layer(graph_module: GraphModule, layer: Node, scale: Tensor, shift: Tensor) -> None:
    """weight[c] *= scale[c]; bias = bias * scale + shift, along the weight's output channels."""
    node = layer.args[1]
    weight = constants.value_of(graph_module, node)
    axis = WEIGHTED[layer.target]
    if axis == 1:  # transposed convolution [in, out / groups, ...]: groups share the second axis
        groups = layer.args[6] if len(layer.args) > 6 else 1
        per_group = scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
        scaled = (weight.reshape(groups, -1, *weight.shape[1:]) * per_group).reshape(weight.shape)
    else:
        scaled = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    bias = layer.args[2] if len(layer.args) > 2 else None
    shifted = shift if bias is None else constants.value_of(graph_module, bias) * scale + shift
    name = str(node.target)
    new_weight = constants.add(graph_module, name, scaled, layer)
    new_bias = constants.add(graph_module, name.removesuffix("weight") + "bias", shifted, layer)
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])


def _multiply_and_add(graph_module: GraphModule, node: Node, x: Node, scale: Tensor, shift: Tensor) -> None:
    shape = [1, -1] + [1] * (node.meta["val"].dim() - 2)
    factor = constants.add(graph_module, f"{node.name}_scale", scale.reshape(shape), node)
    offset = constants.add(graph_module, f"{node.name}_shift", shift.reshape(shape), node)
    with graph_module.graph.inserting_before(node):
        product = graph_module.graph.call_function(aten.mul.Tensor, (x, factor))
        total = graph_module.graph.call_function(aten.add.Tensor, (product, offset))
    for new in (product, total):
        new.meta = {"val": node.meta["val"], "module": node.meta.get("module", "")}
    node.replace_all_uses_with(total)
    graph_module.graph.erase_node(node)


def fold_padding(graph_module: GraphModule) -> None:
    """Zero padding that is equal on both sides moves into the convolution after it."""
    for node in calls(graph_module):
        if node.target is aten.constant_pad_nd.default and all(_is_convolution(u) for u in node.users):
            _fold_padding(graph_module, node)


def _is_convolution(node: Node) -> bool:
    return node.target in (aten.conv2d.default, aten.conv1d.default)


def _fold_padding(graph_module: GraphModule, node: Node) -> None:
    source, widths = node.args[0], list(node.args[1])
    fill = node.args[2] if len(node.args) > 2 else 0
    pairs = list(zip(widths[::2], widths[1::2], strict=True))[::-1]  # PyTorch lists the last dimension first
    if fill or any(low != high or low < 0 for low, high in pairs):
        return
    for layer in list(node.users):
        count = 2 if layer.target is aten.conv2d.default else 1
        if len(pairs) > count:
            return
        x, weight, bias, stride, padding, dilation, groups = convolution_arguments(layer)
        total = [
            p + low for p, (low, _) in zip(padding, [(0, 0)] * (count - len(pairs)) + pairs, strict=True)
        ]
        layer.args = (source, weight, bias, stride, total, dilation, groups)


def convolution_arguments(node: Node) -> tuple[Any, Any, Any, list[int], list[int], list[int], int]:
    """(x, weight, bias, stride, padding, dilation, groups) of a conv1d or conv2d, defaults filled in."""
    count = 2 if node.target is aten.conv2d.default else 1
    defaults = (None, None, None, [1] * count, [0] * count, [1] * count, 1)
    found = (*node.args, *defaults[len(node.args) :])
    stride, padding, dilation = (spread(v, count) for v in found[3:6])
    return found[0], found[1], found[2], stride, padding, dilation, found[6]
