"""Ranges chosen by what they cost at the outputs, not by their own error: the observer "output".

A clipped range lowers the error of most values and raises that of the largest. Which of both the model feels
differs from tensor to tensor, so each scale group is rounded alone on its widest and on its least-squares
range, and keeps the one whose rounding makes less noise at the model's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.fx import GraphModule

from edgecomp.compress import plan, scales, sensitivity
from edgecomp.spec import QuantizationPlan, QuantSpec

_GAIN = 0.9
"""A clipped range must save a tenth of the noise: data that were not seen may reach further."""
_RUNS = 1600
"""Scale groups times samples that are tried for each candidate; bounds the time on long unrolled graphs."""
_MOST_SAMPLES = 8


def samples_for(groups: scales.ScaleGroups) -> int:
    """How many samples are run for a graph of that many groups: 8 of a usual one, at least 1."""
    return max(1, min(_MOST_SAMPLES, _RUNS // max(len(groups.members()), 1)))


def choose(
    graph_module: GraphModule,
    groups: scales.ScaleGroups,
    widest: plan.Ranges,
    clipped: plan.Ranges,
    spec: QuantSpec,
    samples: Sequence[Sequence[Tensor]],
) -> dict[str, tuple[float, float]]:
    """Node name -> (low, high): the widest range, or the clipped one of groups where that pays.

    `samples`: inputs of batch 1.
    """
    wide = _noise(graph_module, groups, widest, spec, samples)
    narrow = _noise(graph_module, groups, clipped, spec, samples)
    chosen = dict(widest)
    for nodes, noise in narrow.items():
        if noise < _GAIN * wide[nodes]:
            chosen.update({n: clipped[n] for n in nodes if n in clipped})
    return chosen


def _noise(
    graph_module: GraphModule,
    groups: scales.ScaleGroups,
    ranges: plan.Ranges,
    spec: QuantSpec,
    samples: Sequence[Sequence[Tensor]],
) -> dict[tuple[str, ...], float]:
    alone = QuantizationPlan(plan.activations(groups, ranges, spec), {}, {})
    return {s.nodes: s.noise for s in sensitivity.measure(graph_module, alone, samples)}
