"""From a module to one whose weights lie on palettes: whether, with how many bits each, what is noted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from edgecomp.errors import EdgecompError, InputError
from edgecomp.exporters import coreml_budget, coreml_convert, coreml_importance, coreml_recover
from edgecomp.exporters.coreml_compress import palette_group
from edgecomp.exporters.coreml_toolkit import first_line, torchscript_nodes
from edgecomp.graph import capture, constants
from edgecomp.numerics import palettes
from edgecomp.spec import Data, Problem

# Composite operations that Core ML has and the canonical graph spells out.
_COMPOSITE = {
    f"aten::{name}"
    for name in (
        "layer_norm", "group_norm", "instance_norm", "scaled_dot_product_attention", "lstm", "gru",
        "rnn_tanh", "rnn_relu", "_transformer_encoder_layer_fwd", "_native_multi_head_attention",
    )
}  # fmt: skip
_NO_DATA = "there is no calibration data"
_FACTS_BYTES, _NOTE_BYTES = 3000, 100
"""What the facts inside the package take, and a line of them on each layer."""


@dataclass(frozen=True)
class Settings:
    """`bits`, `group_size`, `min_elements`, `samples`, as the exporter has them. `size`: bytes, or None.

    `asked`: assignment was asked for, so that what stands in its way is an error. `depthwise`: depthwise
    convolutions take 8-bit integers.
    """

    bits: int
    group_size: int | None
    min_elements: int
    samples: int
    size: int | None
    asked: bool
    depthwise: bool


@dataclass(frozen=True)
class Placed:
    """A float module whose weights lie on palettes. `bits_of`: the name of such a weight -> its bits."""

    module: GraphModule
    bits_of: Mapping[str, int]


def place(
    module: nn.Module,
    example: tuple[Tensor, ...],
    data: Data,
    settings: Settings,
    size: Callable[[], int],
    notes: list[Problem],
) -> Placed | None:
    """The module with its weights on palettes; None, with a note, where plain palettes are taken instead.

    `size()`: bytes of the package with plain palettes of 4 bits. Raises InputError where assignment or a
    size was asked for and cannot be had.
    """
    why = _against(module, example, data)
    if why is None:
        try:
            graph_module = capture(module, example)
        except EdgecompError as error:
            why = f"the graph cannot be captured ({first_line(error)})"
    if why is not None:
        if settings.asked or settings.size is not None:
            raise InputError(f"palettes cannot be assigned with the inputs in view: {why}")
        if why != _NO_DATA:  # that is noted with the palettes
            notes.append(Problem("", "palettes", f"every weight took its nearest entry: {why}"))
        return None
    samples = _samples(module, data, settings.samples)
    bits = _bits(graph_module, samples, settings, size, notes)
    if settings.depthwise:
        bits |= {n.name: 8 for n in coreml_recover.depthwise_layers(graph_module, settings.min_elements)}
    stored = coreml_recover.recover(graph_module, samples, bits, _grouping(settings))
    notes.append(Problem("", "palettes", f"weights assigned by GPTQ on {len(samples)} samples"))
    return Placed(graph_module, stored)


def _against(module: nn.Module, example: tuple[Tensor, ...], data: Data) -> str | None:
    if data.calibration is None:
        return _NO_DATA
    try:
        kinds = {node.kind() for node in torchscript_nodes(coreml_convert.trace(module, example))}
    except Exception as error:  # tracing runs the user's code
        return f"the module cannot be traced ({first_line(error)})"
    found = sorted(kinds & _COMPOSITE)
    return f"it would take {found[0].removeprefix('aten::')} apart" if found else None


def _samples(module: nn.Module, data: Data, count: int) -> list[tuple[Tensor, ...]]:
    batches = itertools.islice(data.calibration.batches(1), count)  # type: ignore[union-attr]
    return [tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in batch.inputs) for batch in batches]


def _grouping(settings: Settings) -> coreml_recover.Group:
    def group(bits: int, channels: int, count: int) -> int:
        return palette_group(settings.group_size or channels, bits, channels, count)

    return group


def _bits(
    graph_module: GraphModule,
    samples: Sequence[tuple[Tensor, ...]],
    settings: Settings,
    size: Callable[[], int],
    notes: list[Problem],
) -> dict[str, int]:
    """Layer -> bits: all alike, or chosen under the size."""
    found = coreml_recover.layers(graph_module, settings.min_elements)
    if settings.size is None:
        return {node.name: settings.bits for node in found}
    least = size()
    spare = settings.size - least - _FACTS_BYTES - _NOTE_BYTES * len(found)
    if spare < 0:
        raise InputError(
            f"size is {settings.size} bytes, and the package takes {settings.size - spare} with 4 bits "
            "everywhere; allow more, or prune the model first"
        )
    importance = coreml_importance.measure(graph_module, samples, settings.min_elements)
    layers = [_layer(graph_module, node, importance, _grouping(settings)) for node in found]
    bits = coreml_budget.choose(layers, spare)
    for node in found:
        if bits[node.name] != settings.bits:
            module = node.meta.get("module") or node.name
            notes.append(Problem("", module, f"{bits[node.name]} bits, within the size"))
    return bits


def _layer(
    graph_module: GraphModule,
    node: Node,
    importance: coreml_importance.Importance | None,
    group: coreml_recover.Group,
) -> coreml_budget.Layer:
    """What 4 bits cost the output in this layer, and what each width takes."""
    weight = constants.value_of(graph_module, node.args[1]).detach().numpy()
    channels = weight.shape[0]
    rows = weight.reshape(channels // group(4, channels, weight.size), -1)
    matters = importance.values.get(str(node.args[1].target)) if importance else None
    shares = None if matters is None else matters.reshape(rows.shape) / matters.mean() + 1e-6
    restored = palettes.fit(rows.astype(np.float32), 16, importance=shares).values().reshape(weight.shape)
    error = coreml_budget.rounding_error(weight, restored, matters)
    sizes = coreml_budget.bytes_of(weight.size, channels, lambda b: group(b, channels, weight.size))
    return coreml_budget.Layer(node.name, error, sizes)
