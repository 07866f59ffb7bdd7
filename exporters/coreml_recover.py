"""Weights put on palettes layer by layer, each with its inputs as they are after everything before it.

For every convolution and linear layer: a palette for each group of output channels (k-means weighted by the
second moment of each weight's input), assignment by GPTQ (`edgecomp.numerics.palette_assignment`), and a bias
that restores the mean of the float layer's output; depthwise convolutions take 8-bit integers, and biases of
the same kind. No labels, and no gradients. The module that comes out is float: its weights lie on palettes
and steps, which the compression then finds again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from edgecomp.exporters.coreml_compress import linear_blocks
from edgecomp.exporters.layer_inputs import LAYERS, columns, groups_of
from edgecomp.graph import constants
from edgecomp.numerics import palette_assignment, palettes

Group = Callable[[int, int, int], int]
"""(bits, output channels, weights) -> output channels that share a palette."""


@torch.no_grad()
def recover(
    graph_module: GraphModule, samples: Sequence[tuple[Tensor, ...]], bits: Mapping[str, int], group: Group
) -> dict[str, int]:
    """Put the weights of a canonical graph on palettes and mend its biases, in place.

    `bits`: names of layers -> 4 or 6 (palettes), or 8 (integers per channel, as the package stores them).
    Returns bits by the new weight's name.
    """
    walk = _Walk(graph_module, samples, bits, group)
    for node in list(graph_module.graph.nodes):
        walk.step(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return walk.stored


def layers(graph_module: GraphModule, least: int) -> list[Node]:
    """Convolutions and linear layers whose weight can lie on palettes: stored, not shared, not depthwise."""
    return [n for n in graph_module.graph.nodes if _is_layer(n, least)]


def depthwise_layers(graph_module: GraphModule, least: int) -> list[Node]:
    """Depthwise convolutions that are stored as 8-bit integers."""
    return [n for n in graph_module.graph.nodes if _has_own_weight(n, least) and _is_depthwise(n)]


def _is_layer(node: Node, least: int) -> bool:
    return _has_own_weight(node, least) and not _is_depthwise(node)


def _has_own_weight(node: Node, least: int) -> bool:
    if node.target not in LAYERS or not constants.is_constant(node.args[1]):
        return False
    weight = node.args[1]
    return len(weight.users) == 1 and weight.meta["val"].numel() >= least


def _is_depthwise(node: Node) -> bool:
    shape = tuple(node.args[1].meta["val"].shape)
    return len(shape) > 2 and shape[1] == 1


class _Walk:
    """One pass over the graph with all samples at once, float and on palettes side by side."""

    def __init__(
        self,
        graph_module: GraphModule,
        samples: Sequence[tuple[Tensor, ...]],
        bits: Mapping[str, int],
        group: Group,
    ) -> None:
        self.graph_module = graph_module
        self.bits, self.group = bits, group
        self.stored: dict[str, int] = {}
        self.count = len(samples)
        self.exact: dict[Node, list[Any]] = {}
        self.found: dict[Node, list[Any]] = {}
        self._doors = iter([[s[i] for s in samples] for i in range(len(samples[0]))])
        self._left = {n: len(n.users) for n in graph_module.graph.nodes}

    def step(self, node: Node) -> None:
        if node.op == "output":
            return
        if node.op == "placeholder":
            self.exact[node] = self.found[node] = next(self._doors)
        elif node.op == "get_attr":
            value = constants.value_of(self.graph_module, node).detach()
            self.exact[node] = self.found[node] = [value] * self.count
        else:
            sources = node.all_input_nodes
            self.exact[node] = [self._compute(node, self.exact, i) for i in range(self.count)]
            before = self._decided(node) if node.name in self.bits else self.found
            self.found[node] = [self._compute(node, before, i) for i in range(self.count)]
            self._free(sources)

    def _compute(self, node: Node, values: Mapping[Node, list[Any]], index: int) -> Any:
        args = map_arg(node.args, lambda n: values[n][index])
        return node.target(*args, **map_arg(node.kwargs, lambda n: values[n][index]))

    def _free(self, sources: Sequence[Node]) -> None:
        for source in sources:
            self._left[source] -= 1
            if not self._left[source]:
                self.exact.pop(source, None)
                self.found.pop(source, None)

    def _decided(self, node: Node) -> dict[Node, list[Any]]:
        """The values with the layer's new weight and bias, which the graph has from here on as well."""
        weight = constants.value_of(self.graph_module, node.args[1]).detach()
        groups, shape = groups_of(node), tuple(weight.shape)
        sums = _sums(node, self.exact[node.args[0]], self.found[node.args[0]])
        trained = weight.double().numpy().reshape(groups, shape[0] // groups, -1)
        chosen = self._chosen(trained, sums.hessian, self.bits[node.name])
        replaced = dict(self.found)
        made = self._replace(node, 1, chosen.reshape(shape))
        replaced[node.args[1]] = made
        self.stored[str(node.args[1].target)] = self.bits[node.name]
        bias = node.args[2] if len(node.args) > 2 else None
        if isinstance(bias, Node):
            moved = np.einsum("god,gd->go", trained, sums.exact) - np.einsum("god,gd->go", chosen, sums.mean)
            mended = constants.value_of(self.graph_module, bias).double().numpy() + moved.reshape(-1)
            made = self._replace(node, 2, mended)
            replaced[node.args[2]] = made
        return replaced

    def _chosen(self, trained: np.ndarray, hessian: np.ndarray, bits: int) -> np.ndarray:
        """The weight with every value on a palette, or (8 bits) on the steps of its channel."""
        if bits == 8:
            integers, scale = linear_blocks(trained.reshape(-1, trained.shape[2]), [1, trained.shape[2]], 127)
            return (integers * scale.astype(np.float64)).reshape(trained.shape)
        channels = trained.shape[0] * trained.shape[1]
        group = self.group(bits, channels, trained.size)
        return palette_assignment.assign(trained, hessian, _tables(trained, hessian, 1 << bits, group))

    def _replace(self, node: Node, position: int, value: np.ndarray) -> list[Any]:
        tensor = torch.from_numpy(value.astype(np.float32))
        name = f"{node.meta.get('module') or node.name}.{'weight' if position == 1 else 'bias'}"
        node.update_arg(position, constants.add(self.graph_module, name, tensor, node))
        return [tensor] * self.count


@dataclass(frozen=True)
class _Sums:
    """Means over positions: x x^T of the inputs on palettes, their mean, the float inputs' mean."""

    hessian: np.ndarray
    mean: np.ndarray
    exact: np.ndarray


def _sums(node: Node, exact: Sequence[Tensor], found: Sequence[Tensor]) -> _Sums:
    totals: list[Tensor] = []
    count = 0
    for a, b in zip(exact, found, strict=True):
        x, q = columns(node, a), columns(node, b)
        parts = [t.double() for t in (q @ q.transpose(1, 2), q.sum(2), x.sum(2))]
        totals = [whole + part for whole, part in zip(totals, parts, strict=True)] if totals else parts
        count += q.shape[2]
    return _Sums(*((t / count).numpy() for t in totals))


def _tables(trained: np.ndarray, hessian: np.ndarray, entries: int, group: int) -> np.ndarray:
    """A palette of float16 values for every `group` output channels, repeated: [groups, out, entries]."""
    groups, out, d = trained.shape
    group = group if out % group == 0 else out
    matters = np.broadcast_to(np.einsum("gii->gi", hessian)[:, None, :], trained.shape)
    matters = matters / matters.mean() + 1e-3
    values, shares = (a.reshape(groups * out // group, group * d) for a in (trained, matters))
    lut = palettes.fit(values.astype(np.float32), entries, importance=shares).lut
    return np.repeat(lut, group, axis=0).reshape(groups, out, entries)
