"""Weights on which the 8-bit kernels of an x86 without VNNI do not saturate, in the layers where they would.

Those kernels add two neighbouring products in 16 bits (`edgecomp.numerics.saturation`). An output channel
whose pairs can pass that is rounded again on a larger scale: just large enough that no activation can make
it, with its inputs in view (GPTQ), its bias mended to the same mean. All other channels keep the plan's
integers, and the file means the same on every processor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgecomp.exporters.layer_inputs import LAYERS, columns, groups_of
from edgecomp.graph import constants, fake_quant
from edgecomp.graph.interpret import watch
from edgecomp.numerics import affine, gptq, saturation
from edgecomp.spec import DataSource, QuantizationPlan, TensorQuantization

_SAMPLES = 16
_ROUNDS = 6
_BEYOND = 1.002
"""A scale is raised by this more than it must: rounding on it can bring a pair back to the limit."""


@dataclass
class Seen:
    """Sums over a layer's input columns: x x^T [groups, K, K], x [groups, K], and how many there were."""

    hessian: np.ndarray
    total: np.ndarray
    count: int = 0


@dataclass
class Mended:
    """`notes`: one line for each layer that was rounded again."""

    graph_module: GraphModule
    plan: QuantizationPlan
    notes: list[str] = field(default_factory=list)


def mend(graph_module: GraphModule, plan: QuantizationPlan, source: DataSource) -> Mended:
    """A copy of the graph (biases) and the plan (weights) without layers that saturate."""
    result = Mended(copy.deepcopy(graph_module), plan)
    layers = {n.name: n for n in result.graph_module.graph.nodes if _is_at_risk(n, plan)}
    if not layers:
        return result
    weights = dict(plan.weights)
    for name, found in _observe(graph_module, plan, source, layers).items():
        layer = layers[name]
        key = str(layer.args[1].target)
        if sum(str(other.args[1].target) == key for other in layers.values()) > 1:
            result.notes.append(f"{layer.meta.get('module') or name}: not looked at, its weight is shared")
            continue
        mended = _mended_layer(result.graph_module, layer, plan, found)
        if mended is not None:
            weights[key], note = mended
            result.notes.append(note)
    result.plan = replace(plan, weights=weights)
    result.graph_module.recompile()
    return result


def _is_at_risk(node: Node, plan: QuantizationPlan) -> bool:
    """A convolution or linear layer in integers of 8 bits; depthwise kernels multiply in 16 bits."""
    if node.target not in LAYERS:
        return False
    weight = node.args[1]
    if weight.op != "get_attr" or node.name in plan.float_nodes or str(weight.target) not in plan.weights:
        return False
    source = plan.activations.get(node.args[0].name)
    stored = plan.weights[str(weight.target)]
    if source is None or source.spec.bits != 8 or stored.spec.bits != 8 or stored.values is None:
        return False
    shape = tuple(weight.meta["val"].shape)
    return not (groups_of(node) == shape[0] and shape[1] == 1 and len(shape) > 2)


@torch.no_grad()
def _observe(
    graph_module: GraphModule, plan: QuantizationPlan, source: DataSource, layers: Mapping[str, Node]
) -> dict[str, Seen]:
    """Layer name -> what its rounded input was, over the first calibration samples."""
    rounded = fake_quant.fake_quantize(graph_module, plan)
    readers: dict[str, list[Node]] = {}
    for node in rounded.graph.nodes:
        if node.name in layers:
            readers.setdefault(node.args[0].name, []).append(layers[node.name])
    found: dict[str, Seen] = {}

    def visit(node: Node, value: Tensor) -> None:
        for layer in readers[node.name]:
            _add(found, layer, value)

    for inputs in _samples(source):
        watch(rounded, inputs, visit, frozenset(readers))
    return found


def _samples(source: DataSource) -> Iterator[tuple[Tensor, ...]]:
    for taken, batch in enumerate(source.batches(1)):
        if taken == _SAMPLES:
            return
        yield tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in batch.inputs)


def _add(found: dict[str, Seen], layer: Node, value: Tensor) -> None:
    flat = columns(layer, value).double().numpy()
    groups, depth = flat.shape[:2]
    seen = found.setdefault(layer.name, Seen(np.zeros((groups, depth, depth)), np.zeros((groups, depth))))
    seen.hessian += flat @ flat.transpose(0, 2, 1)
    seen.total += flat.sum(2)
    seen.count += flat.shape[2]


def _mended_layer(
    graph_module: GraphModule, layer: Node, plan: QuantizationPlan, seen: Seen
) -> tuple[TensorQuantization, str] | None:
    """The layer's weight without pairs that saturate, and what was done; None where nothing is at risk.

    The bias moves by what the mean of the layer's outputs would.
    """
    before = plan.weights[str(layer.args[1].target)]
    trained = constants.value_of(graph_module, layer.args[1]).detach().double().numpy()
    rows = Rows(before, trained, seen)
    risky = int((rows.excess() > 1).sum())
    if not risky:
        return None
    after = rows.mended()
    drift = affine.dequantize(before.values, before) - affine.dequantize(after.values, after)  # type: ignore[arg-type]
    moved = np.einsum("god,gd->go", rows.matrices(drift), seen.total / seen.count).reshape(-1)
    _move_bias(graph_module, layer, moved)
    module = layer.meta.get("module") or layer.name
    factor = float((after.scale / before.scale).max())
    return after, f"{module}: {risky} of {len(trained)} output channels on scales up to {factor:.2f} times"


def _move_bias(graph_module: GraphModule, layer: Node, moved: np.ndarray) -> None:
    bias = layer.args[2] if len(layer.args) > 2 else None
    if isinstance(bias, Node):
        value = constants.value_of(graph_module, bias).detach() + torch.from_numpy(moved.astype(np.float32))
        layer.update_arg(2, constants.add(graph_module, f"{layer.name}_safe_bias", value, layer))


@dataclass
class Rows:
    """The output channels of one layer: the plan's integers, trained weights, sums over the inputs."""

    before: TensorQuantization
    trained: np.ndarray
    seen: Seen

    def __post_init__(self) -> None:
        self.integers = np.array(self.before.values, np.int64)
        self.scale = np.broadcast_to(self.before.scale.astype(np.float64), len(self.integers)).copy()
        self.groups = len(self.seen.total)

    def matrices(self, values: np.ndarray) -> np.ndarray:
        """[out, in, *kernel] -> [groups, out / groups, K], as the columns are ordered."""
        return values.reshape(self.groups, values.shape[0] // self.groups, -1)

    def excess(self) -> np.ndarray:
        """[out]: above 1 where a sum of two products can leave int16."""
        channels = self.integers.shape[1]
        return saturation.x86_excess(saturation.in_kernel_order(self.integers), channels)

    def mended(self) -> TensorQuantization:
        """Rows that saturate on larger scales until none does; a row that six rounds leave is cut to fit."""
        for _ in range(_ROUNDS):
            excess = self.excess()
            if not (excess > 1).any():
                break
            self.scale *= np.where(excess > 1, excess * _BEYOND, 1.0)
            self._round(excess > 1)
        excess = np.maximum(self.excess(), 1.0).reshape(-1, *[1] * (self.integers.ndim - 1))
        integers = np.trunc(self.integers / excess).astype(np.int8)
        scale = self.scale.astype(np.float32)
        spec = replace(self.before.spec, axis=0)
        return TensorQuantization(spec, scale, np.zeros(scale.shape, np.int32), integers)

    def _round(self, chosen: np.ndarray) -> None:
        weight, size = self.matrices(self.trained), len(self.integers) // self.groups
        for group in range(self.groups):
            local = np.flatnonzero(chosen[group * size : (group + 1) * size])
            if len(local):
                rows, one = local + group * size, slice(group, group + 1)
                rounded = gptq.round_weights(
                    weight[one, local], self.seen.hessian[one], self.scale[None, rows], self.before.spec.qmax
                )
                self.integers[rows] = rounded[0].reshape(len(rows), *self.integers.shape[1:])
