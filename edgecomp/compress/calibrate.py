"""Calibration: scale groups of a captured graph and the range of each value, with what rules change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import GraphModule

from edgecomp.compress import observe, output_ranges, plan, rules, scales
from edgecomp.spec import DataSource, QuantSpec, TensorQuantization

Ranges = dict[str, tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Calibration:
    """`ranges`: node name -> (low, high) as the observers chose it; `groups`: what shares a scale.

    `widest`: the ranges of values that were clipped for the sake of 8 bits; 16 bits need no clipping.
    """

    groups: scales.ScaleGroups
    ranges: Mapping[str, tuple[float, float]]
    widest: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def calibrate(
    graph_module: GraphModule,
    source: DataSource,
    samples: int,
    bits: int,
    settings: observe.ObserverSettings,
    by_name: rules.Rules | None = None,
) -> Calibration:
    """Observe the first `samples` samples. A range known from preprocessing is never made smaller.

    The model's outputs keep their widest range, with room for unseen samples: what is cut off there reaches
    the user, the largest logits first.
    """
    groups = scales.group(graph_module, bits)
    names = [n for n in groups.root if groups.find(n) not in groups.prescribed]
    other = rules.by_group(graph_module, by_name or {}, groups, "observer")
    outputs = _outputs(graph_module, groups)
    watched = _Watched(graph_module, source, samples, plan.activation_spec(bits), outputs)
    found: Ranges = {}
    clipped: Ranges = {}
    for observer in dict.fromkeys((settings.observer, *other.values())):
        wanted = [n for n in names if other.get(groups.find(n), settings.observer) == observer]
        if observer == "output" and bits == 8:
            widest, clipped = watched.both(wanted)
            found |= widest
            clipped = {name: chosen for name, chosen in clipped.items() if name not in outputs}
        else:
            plain: observe.Observer = "minmax" if observer == "output" else observer
            found |= watched.ranges(wanted, observe.ObserverSettings(plain, settings.percentile))
    found = _known(graph_module, source, scales.behind_pools(graph_module, found))
    if clipped:
        clipped = _known(graph_module, source, scales.behind_pools(graph_module, {**found, **clipped}))
        few = list(observe.tensor_batches(source, output_ranges.samples_for(groups)))
        chosen = output_ranges.choose(graph_module, groups, found, clipped, watched.spec, few)
        return Calibration(groups, chosen, found)
    return Calibration(groups, found)


@dataclass(frozen=True, eq=False)
class _Watched:
    """A graph run over the first samples of a source."""

    graph_module: GraphModule
    source: DataSource
    samples: int
    spec: QuantSpec
    roomy: frozenset[str]

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        return observe.tensor_batches(self.source, self.samples)

    def ranges(self, names: Sequence[str], settings: observe.ObserverSettings) -> Ranges:
        return observe.observe(self.graph_module, self._batches, names, self.spec, settings, self.roomy)

    def both(self, names: Sequence[str]) -> tuple[Ranges, Ranges]:
        settings = observe.ObserverSettings("mse")
        return observe.widest_and_clipped(
            self.graph_module, self._batches, names, self.spec, settings, self.roomy
        )


def _outputs(graph_module: GraphModule, groups: scales.ScaleGroups) -> frozenset[str]:
    """Names of the model's outputs and of all that shares a scale with them."""
    given = graph_module.graph.find_nodes(op="output")[0].all_input_nodes
    roots = {groups.find(n.name) for n in given if n.name in groups.root}
    return frozenset(name for name in groups.root if groups.find(name) in roots)


def _known(graph_module: GraphModule, source: DataSource, found: Ranges) -> Ranges:
    """The input's range never smaller than what preprocessing can give."""
    door = graph_module.graph.find_nodes(op="placeholder")[0].name
    if source.preprocessing is None or not source.preprocessing.mean or door not in found:
        return found
    low, high = source.preprocessing.exact_range()
    return {**found, door: (min(low, found[door][0]), max(high, found[door][1]))}


def activations(
    graph_module: GraphModule, found: Calibration, bits: int, by_name: rules.Rules | None = None
) -> dict[str, TensorQuantization]:
    """Node name -> quantization, in `bits` or what a rule says of its group."""
    widths = rules.by_group(graph_module, by_name or {}, found.groups, "activation_bits")
    changed = {root: width for root, width in widths.items() if width != bits}
    ranges = {**found.ranges, **found.widest} if bits == 8 else found.ranges
    other = plan.with_bits(graph_module, found.groups, ranges, changed)
    return plan.activations(found.groups, found.ranges, plan.activation_spec(bits), other)
