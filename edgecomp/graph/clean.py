"""Small rewrites that bring an exported graph to its canonical form; none changes a value."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from edgecomp.graph import constants

aten = torch.ops.aten

_ARITHMETIC = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
_SCALAR_FORMS = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}
_COPIES = {
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
}
_SAME_SHAPE_IS_NO_OP = {
    aten.reshape.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.squeeze.dims,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
}


def calls(graph_module: GraphModule) -> list[Node]:
    return [n for n in graph_module.graph.nodes if n.op == "call_function"]


def value(node: Node) -> Tensor:
    """The fake tensor of a node's output."""
    found = node.meta["val"]
    if not isinstance(found, Tensor):
        raise TypeError(f"{node.name} gives {type(found).__name__}, not one tensor")
    return found


def lift_scalars(graph_module: GraphModule) -> None:
    """`add(x, 3.0)` -> `add(x, constant)`: a number in arithmetic becomes a constant with a scale of its own.

    Division by a constant becomes multiplication; `alpha` of add and sub becomes a multiplication.
    """
    for node in calls(graph_module):
        node.target = _SCALAR_FORMS.get(node.target, node.target)
        if node.target not in _ARITHMETIC or not value(node).is_floating_point():
            continue
        _lift_alpha(graph_module, node)
        for index, argument in enumerate(node.args):
            if isinstance(argument, int | float):
                lifted = constants.add(graph_module, f"{node.name}_scalar", constants.scalar(argument), node)
                node.update_arg(index, lifted)
        _divide_by_constant(graph_module, node)


def _lift_alpha(graph_module: GraphModule, node: Node) -> None:
    alpha = node.kwargs.get("alpha", 1)
    if alpha != 1:
        factor = constants.add(graph_module, f"{node.name}_alpha", constants.scalar(float(str(alpha))), node)
        with graph_module.graph.inserting_before(node):
            scaled = graph_module.graph.call_function(aten.mul.Tensor, (node.args[1], factor))
        scaled.meta = {"val": node.args[1].meta["val"], "module": node.meta["module"]}
        node.update_arg(1, scaled)
    node.kwargs = {}


def _divide_by_constant(graph_module: GraphModule, node: Node) -> None:
    if node.target is aten.div.Tensor and constants.is_constant(node.args[1]):
        divisor = constants.value_of(graph_module, node.args[1])
        if divisor.is_floating_point() and bool((divisor != 0).all()):
            inverse = constants.add(graph_module, f"{node.name}_inverse", 1.0 / divisor, node)
            node.target = aten.mul.Tensor
            node.update_arg(1, inverse)


def normalize(graph_module: GraphModule) -> None:
    """One spelling for each operation: clamps, powers, squeezes, padding modes, pooling to one pixel."""
    for node in calls(graph_module):
        rewrite = _REWRITES.get(node.target)
        if rewrite:
            rewrite(graph_module, node)


def _clamp(graph_module: GraphModule, node: Node) -> None:
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min", None)
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max", None)
    if node.target is aten.hardtanh.default and len(node.args) == 1:
        low, high = -1.0, 1.0
    if isinstance(node.args[0], Node) and len(node.args[0].users) == 1:
        inner = _bounds(node.args[0])
        if inner is not None:
            low, high = _composed(inner, (low, high))
            node.update_arg(0, node.args[0].args[0])
    node.kwargs = {}
    if (low, high) == (0, 6):
        node.target, node.args = aten.relu6.default, (node.args[0],)
    elif low == 0 and high is None:
        node.target, node.args = aten.relu.default, (node.args[0],)
    else:
        node.target, node.args = aten.clamp.default, (node.args[0], low, high)


def _bounds(node: Node) -> tuple[Any, Any] | None:
    """Limits of a clamp that has its canonical form already, else None."""
    if node.target is aten.relu.default:
        return 0, None
    if node.target is aten.relu6.default:
        return 0, 6
    return (node.args[1], node.args[2]) if node.target is aten.clamp.default else None


def _composed(inner: tuple[Any, Any], outer: tuple[Any, Any]) -> tuple[Any, Any]:
    """Limits of outer(inner(x)): the inner limits, themselves clamped by the outer ones."""
    low, high = outer
    limits = []
    for limit, missing in zip(inner, outer, strict=True):
        if limit is not None:
            limit = limit if low is None else max(limit, low)
            limit = limit if high is None else min(limit, high)
        limits.append(missing if limit is None else limit)
    return limits[0], limits[1]


def _relu6(graph_module: GraphModule, node: Node) -> None:
    node.target, node.args = aten.relu6.default, (node.args[0],)


def _power(graph_module: GraphModule, node: Node) -> None:
    if node.args[1] == 2:
        node.target, node.args = aten.mul.Tensor, (node.args[0], node.args[0])
    elif node.args[1] == 0.5:
        node.target, node.args = aten.sqrt.default, (node.args[0],)
    elif node.args[1] == -0.5:
        node.target, node.args = aten.rsqrt.default, (node.args[0],)


def _squeeze(graph_module: GraphModule, node: Node) -> None:
    shape = list(value(node).shape)
    node.target, node.args, node.kwargs = aten.reshape.default, (node.args[0], shape), {}


def _unsqueeze(graph_module: GraphModule, node: Node) -> None:
    _squeeze(graph_module, node)


def _pool_to_one(graph_module: GraphModule, node: Node) -> None:
    shape_in, shape_out = value(node.args[0]).shape, value(node).shape
    if all(d == 1 for d in shape_out[-2:]):
        node.target, node.args = aten.mean.dim, (node.args[0], [-1, -2], True)
    elif all(i % o == 0 for i, o in zip(shape_in[-2:], shape_out[-2:], strict=True)):
        window = [i // o for i, o in zip(shape_in[-2:], shape_out[-2:], strict=True)]
        node.target, node.args = aten.avg_pool2d.default, (node.args[0], window, window)


def _same_padding(graph_module: GraphModule, node: Node) -> None:
    """`padding="same"` (stride 1) or "valid" -> numbers; the odd pixel goes to the end, as in PyTorch."""
    arguments = [*node.args, *[None] * (7 - len(node.args))]
    x, weight, bias, stride, mode, dilation, groups = arguments
    two = node.target is aten.conv2d.padding
    count = 2 if two else 1
    kernel = list(value(weight).shape[2:])
    steps = spread(dilation or 1, count)
    total = [d * (k - 1) if mode == "same" else 0 for d, k in zip(steps, kernel, strict=True)]
    if any(t % 2 for t in total):
        before_and_after = [p for t in reversed(total) for p in (t // 2, t - t // 2)]
        with graph_module.graph.inserting_before(node):
            padded = graph_module.graph.call_function(
                aten.constant_pad_nd.default, (x, before_and_after, 0.0)
            )
        padded.meta = {
            "module": node.meta["module"],
            "val": aten.constant_pad_nd(value(x), before_and_after, 0.0),
        }
        x, total = padded, [0] * count
    node.target = aten.conv2d.default if two else aten.conv1d.default
    node.args = (x, weight, bias, spread(stride or 1, count), [t // 2 for t in total], steps, groups or 1)


def spread(setting: Any, count: int) -> list[int]:
    """One number for all `count` axes, or a list as it is."""
    return [setting] * count if isinstance(setting, int) else list(setting) * (count // len(setting))


def _softmax(graph_module: GraphModule, node: Node) -> None:
    node.target = aten.softmax.int if node.target is aten._softmax.default else aten.log_softmax.int
    node.args = node.args[:2]


_REWRITES: dict[Any, Callable[[GraphModule, Node], None]] = {
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.hardtanh.default: _clamp,
    aten.relu6.default: _relu6,
    aten.pow.Tensor_Scalar: _power,
    aten.squeeze.dims: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.default: _squeeze,
    aten.unsqueeze.default: _unsqueeze,
    aten.view.default: _squeeze,
    aten._unsafe_view.default: _squeeze,
    aten.reshape.default: _squeeze,
    aten.flatten.using_ints: _squeeze,
    aten.adaptive_avg_pool2d.default: _pool_to_one,
    aten.conv2d.padding: _same_padding,
    aten.conv1d.padding: _same_padding,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _softmax,
}


def drop_no_ops(graph_module: GraphModule) -> None:
    """Remove copies, casts to the same dtype, views that keep the shape, and checks of dtypes."""
    for node in calls(graph_module):
        if node.target is aten._assert_tensor_metadata.default:
            graph_module.graph.erase_node(node)
            continue
        source = node.args[0] if node.args else None
        if isinstance(source, Node) and _is_no_op(node, source):
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)


def _is_no_op(node: Node, source: Node) -> bool:
    if node.target in _COPIES:
        return True
    if node.target is aten._to_copy.default:
        return value(node).dtype == value(source).dtype
    if node.target is operator.getitem or node.target not in _SAME_SHAPE_IS_NO_OP:
        return False
    return value(node).shape == value(source).shape and _keeps_everything(node)


def _keeps_everything(node: Node) -> bool:
    """A pool of window 1 keeps its input; a slice of the same shape has step 1 and takes all."""
    if node.target is aten.avg_pool2d.default:
        return all(k == 1 for k in node.args[1])
    return True


def refresh_shapes(graph_module: GraphModule, inputs: Sequence[Tensor]) -> None:
    """Recompute `meta['val']` of every node, new ones included, from the inputs' shapes."""
    modules = {n: n.meta.get("module", "") for n in graph_module.graph.nodes}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(graph_module, mode).propagate(*inputs)
    for node, name in modules.items():
        node.meta["module"] = name
