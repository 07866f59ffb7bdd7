"""Calibration: scale groups of a captured graph and the range of each value, with what rules change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import GraphModule

from edgecomp.compress import observe, plan, rules, scales
from edgecomp.spec import DataSource, TensorQuantization


@dataclass(frozen=True, eq=False)
class Calibration:
    """`ranges`: node name -> (low, high) as the observers chose it; `groups`: what shares a scale."""

    groups: scales.ScaleGroups
    ranges: Mapping[str, tuple[float, float]]


def calibrate(
    graph_module: GraphModule,
    source: DataSource,
    samples: int,
    bits: int,
    settings: observe.ObserverSettings,
    by_name: rules.Rules | None = None,
) -> Calibration:
    """Observe the first `samples` samples. A range known from preprocessing is never made smaller."""
    groups = scales.group(graph_module, bits)
    names = [n for n in groups.root if groups.find(n) not in groups.prescribed]
    other = rules.by_group(graph_module, by_name or {}, groups, "observer")
    found: dict[str, tuple[float, float]] = {}
    for observer in dict.fromkeys((settings.observer, *other.values())):
        wanted = [n for n in names if other.get(groups.find(n), settings.observer) == observer]
        found.update(
            observe.observe(
                graph_module,
                lambda: observe.tensor_batches(source, samples),
                wanted,
                plan.activation_spec(bits),
                observe.ObserverSettings(observer, settings.percentile),
            )
        )
    found = scales.behind_pools(graph_module, found)
    if source.preprocessing is not None and source.preprocessing.mean:
        door = graph_module.graph.find_nodes(op="placeholder")[0].name
        if door in found:
            low, high = source.preprocessing.exact_range()
            found[door] = (min(low, found[door][0]), max(high, found[door][1]))
    return Calibration(groups, found)


def activations(
    graph_module: GraphModule, found: Calibration, bits: int, by_name: rules.Rules | None = None
) -> dict[str, TensorQuantization]:
    """Node name -> quantization, in `bits` or what a rule says of its group."""
    widths = rules.by_group(graph_module, by_name or {}, found.groups, "activation_bits")
    changed = {root: width for root, width in widths.items() if width != bits}
    other = plan.with_bits(graph_module, found.groups, found.ranges, changed)
    return plan.activations(found.groups, found.ranges, plan.activation_spec(bits), other)
