"""Which way of mending biases makes less noise at the model's outputs, on samples that did not mend them.

The mean that a few clipped values pull along can move a whole layer (CREPE-tiny loses 5 dB by it), and
leaving such a mean alone costs other models as much: no rule tells which, a few samples do.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from edgecomp.graph import constants
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.spec import QuantizationPlan

Biases = Mapping[str, Tensor]


def write(graph_module: GraphModule, biases: Biases) -> None:
    """Give the layers named their new biases, in place."""
    layers = {n.name: n for n in graph_module.graph.nodes}
    for name, bias in biases.items():
        layer = layers[name]
        layer.update_arg(2, constants.add(graph_module, f"{name}_mended_bias", bias, layer))
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


@torch.no_grad()
def quieter(
    graph_module: GraphModule,
    plan: QuantizationPlan,
    candidates: Sequence[Biases],
    samples: Sequence[Sequence[Tensor]],
) -> Biases:
    """The candidate whose fake-quantized outputs are nearest to the graph's own; the first one of equals."""
    expected = [_outputs(graph_module, inputs) for inputs in samples]
    errors = []
    for biases in candidates:
        mended = copy.deepcopy(graph_module)
        write(mended, biases)
        rounded = fake_quantize(mended, plan)
        found = [_outputs(rounded, inputs) for inputs in samples]
        errors.append(sum(_distance(f, e) for f, e in zip(found, expected, strict=True)))
    return candidates[errors.index(min(errors))]


def _outputs(graph_module: GraphModule, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = graph_module(*inputs)
    return [t for t in (found if isinstance(found, list | tuple) else (found,)) if t.is_floating_point()]


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return sum(float((f.double() - e.double()).square().sum()) for f, e in pairs)
