"""Static post-training quantization: one plan for every target."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import torch
from torch.fx import GraphModule

from edgecomp.compress import observe, plan, rounding, scales
from edgecomp.errors import DataError, InputError
from edgecomp.graph import capture
from edgecomp.spec import Candidate, Data, DataSource, StepRecord, TensorQuantization

Rounding = Literal["nearest", "gptq"]

_ROUNDING_SAMPLES = 32
"""Samples that the rounding sees: they are held at once, so memory grows with them."""


@dataclass(frozen=True)
class Quantize:
    """Post-training static quantization: int8 weights per channel, int8 activations per tensor.

    `observer`: minmax, moving-average, percentile, entropy or mse. `samples`: how many calibration samples
    are used. `rounding`: "gptq" rounds weights with their inputs in view and mends biases (32 samples at
    most), "nearest" is plain. `weight_bits`: 4 or 8. `activation_bits`: 8 or 16. `exclude`: patterns of
    module names (or `type:conv2d`) that stay float; each is listed in the plan with its reason.
    """

    observer: observe.Observer = "minmax"
    percentile: float = 99.99
    samples: int = 128
    rounding: Rounding = "gptq"
    weight_bits: int = 8
    activation_bits: int = 8
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weight_bits not in (4, 8):
            raise InputError(f"weight_bits is {self.weight_bits}; expected 4 or 8")
        if self.activation_bits not in (8, 16):
            raise InputError(f"activation_bits is {self.activation_bits}; expected 8 or 16")
        if self.rounding not in get_args(Rounding):
            raise InputError(
                f"rounding is {self.rounding!r}; expected one of {', '.join(get_args(Rounding))}"
            )
        if self.samples < 1:
            raise InputError(f"samples is {self.samples}; expected at least 1")
        self.observer_settings()

    def observer_settings(self) -> observe.ObserverSettings:
        return observe.ObserverSettings(self.observer, self.percentile)

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        """A candidate whose module is the canonical float graph and whose plan every exporter lowers.

        Raises DataError without calibration data, and where calibration meets NaN.
        """
        source = data.calibration or data.train
        if source is None or len(source) == 0:
            raise DataError(
                "quantize needs calibration data: give --calib, or data.calibration in the recipe"
            )
        graph_module = capture(candidate.module, example_inputs(candidate))
        ranges, groups = self._ranges(graph_module, source)
        decided = plan.activations(groups, ranges, plan.activation_spec(self.activation_bits))
        floats = excluded(graph_module, self.exclude)
        rounded = self._round(graph_module, source, decided, floats)
        quantization = plan.assemble(graph_module, decided, rounded, floats)
        notes = tuple(f"{name} stays float: {why}" for name, why in quantization.float_nodes.items())
        record = StepRecord("quantize", "quantize", asdict(self), notes)
        return replace(
            candidate,
            module=graph_module,
            quantization=quantization,
            history=(*candidate.history, record),
            original=candidate.original if candidate.original is not None else candidate.module,
        )

    def _round(
        self,
        graph_module: GraphModule,
        source: DataSource,
        decided: Mapping[str, TensorQuantization],
        floats: Mapping[str, str],
    ) -> dict[str, TensorQuantization]:
        if self.rounding == "nearest":
            return plan.weights(graph_module, decided, {}, self.weight_bits)
        samples = list(observe.tensor_batches(source, min(self.samples, _ROUNDING_SAMPLES)))
        return rounding.round_by_inputs(graph_module, samples, decided, floats, self.weight_bits)

    def _ranges(
        self, graph_module: GraphModule, source: DataSource
    ) -> tuple[Mapping[str, tuple[float, float]], scales.ScaleGroups]:
        groups = scales.group(graph_module, self.activation_bits)
        names = [n for n in groups.root if groups.find(n) not in groups.prescribed]
        found = observe.observe(
            graph_module,
            lambda: observe.tensor_batches(source, self.samples),
            names,
            plan.activation_spec(self.activation_bits),
            self.observer_settings(),
        )
        if source.preprocessing is not None and source.preprocessing.mean:
            door = graph_module.graph.find_nodes(op="placeholder")[0].name
            if door in found:
                low, high = source.preprocessing.exact_range()
                found[door] = (min(low, found[door][0]), max(high, found[door][1]))
        return found, groups


def example_inputs(candidate: Candidate) -> tuple[torch.Tensor, ...]:
    """Zeros of the candidate's input shapes and dtypes, for capturing its graph."""
    return tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in candidate.inputs)


def excluded(graph_module: GraphModule, patterns: tuple[str, ...]) -> dict[str, str]:
    """Node name -> reason for every node whose module name (or `type:op`) matches a pattern.

    Raises InputError for a pattern that matches nothing: a typing error would silently quantize the layer.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        matches = [
            n.name for n in graph_module.graph.nodes if n.op == "call_function" and _matches(n, pattern)
        ]
        if not matches:
            modules = sorted({n.meta["module"] for n in graph_module.graph.nodes if n.meta.get("module")})
            raise InputError(
                f"exclude pattern {pattern!r} matches no module; modules are {', '.join(modules[:12])} ..."
            )
        found.update(dict.fromkeys(matches, f"excluded by {pattern!r}"))
    return found


def _matches(node: torch.fx.Node, pattern: str) -> bool:
    if pattern.startswith("type:"):
        return fnmatch.fnmatch(str(node.target).split(".")[1], pattern.removeprefix("type:"))
    module = node.meta.get("module", "")
    return fnmatch.fnmatch(module, pattern) or module.startswith(pattern + ".")
