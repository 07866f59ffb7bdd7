"""Weights made fit for integers before they are rounded; the float function stays what it was.

Equalizing: a per-tensor activation scale is set by the loudest channel; a quiet one is left with few steps.
Factor for channel c: max|X_c|^share / max|W_c|^(1 - share) (Xiao et al., "SmoothQuant", ICML 2023, equation
4), which for layers with a ReLU between is cross-layer equalization (Nagel et al., ICCV 2019, section 4.1)
with activations in view. A depthwise reader has a weight scale for each channel: it takes all of it.

Absorbing (Nagel et al., section 4.1.3): where a channel stays above c before its ReLU, c moves from its bias
to the next layers' biases, and the range that the ReLU's result needs becomes smaller by c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgecomp.compress import channels
from edgecomp.compress.channels import ChannelGroup
from edgecomp.compress.columns import groups_of
from edgecomp.graph import constants
from edgecomp.graph.fold import convolution_arguments
from edgecomp.graph.interpret import watch

aten = torch.ops.aten

Batches = Callable[[], Iterable[Sequence[Tensor]]]

_MOST = 64.0
"""Largest factor for one channel against the geometric mean: an almost dead channel is not worth more."""
_MARGIN = 0.1
"""Share of a channel's observed spread that is kept above zero when its bias is absorbed: unseen inputs."""


def fit_weights(graph_module: GraphModule, batches: Batches, share: float, absorb: bool) -> tuple[str, ...]:
    """Absorb biases, then equalize, in place; returns one line for each thing done."""
    notes = []
    if absorb:
        notes.append(f"absorbed high biases of {absorb_biases(graph_module, batches)} channels")
    if share:
        notes.append(f"equalized {equalize(graph_module, batches, share)} groups of channels")
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return tuple(notes)


def equalize(graph_module: GraphModule, batches: Batches, share: float) -> int:
    """Scale the channels of every group; returns how many groups there are."""
    found = channels.groups(graph_module)
    spans = _spans(graph_module, batches, {n: g.axis for g in found for n in g.values})
    for group in found:
        loudest = torch.stack(
            [torch.maximum(-spans[n.name][0], spans[n.name][1]) for n in group.values]
        ).amax(0)
        channels.scale(graph_module, group, factors(graph_module, group, loudest, share))
    return len(found)


def factors(graph_module: GraphModule, group: ChannelGroup, loudest: Tensor, share: float) -> Tensor:
    """What each channel is divided by [channels]; 1 where nothing was seen or nothing is read.

    >>> # |X| up to (8, 2), |W| up to (1, 1), share 0.5: (2.83, 1.41), and over their geometric mean 2:
    >>> # (1.41, 0.71). Activations then span (5.66, 2.83), weights (1.41, 0.71).
    """
    read = torch.stack([_read(graph_module, r) for r in group.readers]).amax(0)
    alive = (loudest > 0) & (read > 0)
    if not bool(alive.any()):
        return torch.ones_like(loudest)
    taken = 1.0 if group.depthwise else share
    raw = loudest.clamp_min(1e-12) ** taken / read.clamp_min(1e-12) ** (1 - taken)
    middle = raw[alive].log().mean().exp()
    return torch.where(alive, (raw / middle).clamp(1 / _MOST, _MOST), 1.0)


def _read(graph_module: GraphModule, reader: Node) -> Tensor:
    """Largest weight that reads each channel [channels]."""
    weight = constants.value_of(graph_module, reader.args[1]).abs()
    if groups_of(reader) > 1:
        count = reader.args[0].meta["val"].shape[1]
        return weight.reshape(count, -1).amax(1)
    return weight.transpose(0, 1).flatten(1).amax(1)


def _spans(
    graph_module: GraphModule, batches: Batches, axes: dict[Node, int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Node name -> smallest and largest value of each channel, [channels] each."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    by_name = {n.name: axis for n, axis in axes.items()}

    def visit(node: Node, value: Tensor) -> None:
        others = [d for d in range(value.dim()) if d != by_name[node.name]]
        low, high = value.amin(others), value.amax(others)
        known = found.get(node.name, (low, high))
        found[node.name] = (torch.minimum(low, known[0]), torch.maximum(high, known[1]))

    for inputs in batches():
        watch(graph_module, inputs, visit, frozenset(by_name))
    return found


def absorb_biases(graph_module: GraphModule, batches: Batches) -> int:
    """Move biases across a single ReLU into readers without padding; returns how many channels were moved."""
    found = [g for g in channels.groups(graph_module) if _absorbs(g)]
    spans = _spans(graph_module, batches, {g.layers[0]: g.axis for g in found})
    moved = 0
    for group in found:
        low, high = spans[group.layers[0].name]
        shift = (low - _MARGIN * (high - low)).clamp_min(0)
        moved += int((shift > 0).sum())
        if bool((shift > 0).any()):
            _shift(graph_module, group, shift)
    return moved


def _absorbs(group: ChannelGroup) -> bool:
    if len(group.values) != 2 or len(group.layers) != 1 or group.values[1].target is not aten.relu.default:
        return False
    has_bias = len(group.layers[0].args) > 2 and isinstance(group.layers[0].args[2], Node)
    return has_bias and all(
        r.target is aten.linear.default or not any(convolution_arguments(r)[4]) for r in group.readers
    )


def _shift(graph_module: GraphModule, group: ChannelGroup, shift: Tensor) -> None:
    layer = group.layers[0]
    channels.set_bias(graph_module, layer, constants.value_of(graph_module, layer.args[2]) - shift)
    for reader in group.readers:
        weight = constants.value_of(graph_module, reader.args[1])
        count = groups_of(reader)
        each = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        spread = shift.reshape(count, -1).repeat_interleave(weight.shape[0] // count, 0)
        added = (each * spread).sum(1)
        has = len(reader.args) > 2 and isinstance(reader.args[2], Node)
        old = constants.value_of(graph_module, reader.args[2]) if has else torch.zeros_like(added)
        channels.set_bias(graph_module, reader, old + added)
