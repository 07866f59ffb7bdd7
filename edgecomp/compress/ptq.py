"""Static post-training quantization: one plan for every target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import torch
from torch.fx import GraphModule

from edgecomp.compress import (
    analytic,
    calibrate,
    equalize,
    norms,
    observe,
    plan,
    rounding,
    rules,
    scales,
    sensitivity,
    wider,
)
from edgecomp.compress.rounding import Correction, Method, Rounding
from edgecomp.compress.rules import Rule
from edgecomp.errors import DataError, InputError
from edgecomp.graph import capture
from edgecomp.spec import Candidate, Data, DataSource, StepRecord, TensorQuantization

_ROUNDING_SAMPLES = 32
"""Samples that the rounding sees: they are held at once, so memory grows with them."""
_CHECKING_SAMPLES = 8
"""Samples after those, on which mended biases are checked."""
_WIDENING_SAMPLES = 4
"""Samples for sensitivities: noises differ between roundings by far more than between samples."""


@dataclass(frozen=True)
class Quantize:
    """Post-training static quantization: int8 weights per channel, int8 activations per tensor.

    `observer`: minmax, moving-average, percentile, entropy, mse, or output: for each scale min-max or mse,
    by the noise at the model's outputs. `samples`: how many calibration samples are used. `rounding`: "gptq"
    rounds weights with their inputs in view (32 samples at most), "descent" goes on from there,
    "sequential-mse" chooses each scale by the error on those inputs, "nearest" is plain. `bias_correction`:
    "empirical", "analytic", "checked" or "none" ("auto": analytic with nearest, else checked; see
    `rounding.Method`).
    `equalize`: share (0 to 1) of the differences between channels that moves from activations into the
    next layer's weights, where this is exact; `absorb`: large biases before a ReLU move into the next layer.
    `weight_bits`: 4 or 8. `activation_bits`: 8 or 16. `rules`: pattern of module names (or `type:conv2d`) ->
    what differs there, such as `{activation_bits: 16}`. `activation_sqnr_db`: give the fewest activations 16
    bits so that the noise of all activations is predicted to lie this far below the outputs (none where 8
    bits manage it); each is noted. `exclude`: patterns that stay float; each is listed
    in the plan with its reason.
    """

    observer: observe.Observer = "output"
    percentile: float = 99.99
    samples: int = 128
    rounding: Rounding = "gptq"
    bias_correction: Correction = "auto"
    equalize: float = 0.0
    absorb: bool = False
    weight_bits: int = 8
    activation_bits: int = 8
    activation_sqnr_db: float | None = None
    rules: Mapping[str, Rule] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _one_of("weight_bits", self.weight_bits, (4, 8))
        _one_of("activation_bits", self.activation_bits, (8, 16))
        _one_of("rounding", self.rounding, get_args(Rounding))
        _one_of("bias_correction", self.bias_correction, get_args(Correction))
        if self.samples < 1:
            raise InputError(f"samples is {self.samples}; expected at least 1")
        if not 0 <= self.equalize <= 1:
            raise InputError(f"equalize is {self.equalize}; expected a share from 0 to 1")
        if self.activation_sqnr_db is not None and not 0 < self.activation_sqnr_db <= 80:
            raise InputError(
                f"activation_sqnr_db is {self.activation_sqnr_db}; expected more than 0, at most 80 dB"
            )
        self.observer_settings()

    def observer_settings(self) -> observe.ObserverSettings:
        return observe.ObserverSettings(self.observer, self.percentile)

    def method(self) -> Method:
        """How integers and biases are found, "auto" resolved."""
        plain: Correction = "analytic" if self.rounding == "nearest" else "checked"
        return Method(self.rounding, plain if self.bias_correction == "auto" else self.bias_correction)

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        """A candidate whose module is the canonical float graph and whose plan every exporter lowers.

        Raises DataError without calibration data, and where calibration meets NaN.
        """
        source = calibration_source(data)
        graph_module = capture(candidate.module, example_inputs(candidate))
        norms.accumulate_squares(graph_module)
        floats = rules.excluded(graph_module, self.exclude)
        notes = self.fit_weights(graph_module, source)
        found = calibrate.calibrate(
            graph_module, source, self.samples, self.activation_bits, self.observer_settings(), self.rules
        )
        decided, widened = self.decide(graph_module, source, found, floats)
        notes += widened
        rounded = self.round(graph_module, source, decided, floats)
        quantization = plan.assemble(graph_module, decided, rounded, floats)
        notes += tuple(f"{name} stays float: {why}" for name, why in quantization.float_nodes.items())
        record = StepRecord("quantize", "quantize", asdict(self), notes)
        return replace(
            candidate,
            module=graph_module,
            quantization=quantization,
            history=(*candidate.history, record),
            original=candidate.original if candidate.original is not None else candidate.module,
        )

    def fit_weights(self, graph_module: GraphModule, source: DataSource) -> tuple[str, ...]:
        """Equalize and absorb, in place; returns what was done. The float function stays the same."""
        if not self.equalize and not self.absorb:
            return ()
        return equalize.fit_weights(
            graph_module,
            lambda: observe.tensor_batches(source, min(self.samples, _ROUNDING_SAMPLES)),
            self.equalize,
            self.absorb,
        )

    def decide(
        self,
        graph_module: GraphModule,
        source: DataSource,
        found: calibrate.Calibration,
        floats: Mapping[str, str],
    ) -> tuple[dict[str, TensorQuantization], tuple[str, ...]]:
        """The quantization of every value, and notes on what `activation_sqnr_db` widened."""
        decided = calibrate.activations(graph_module, found, self.activation_bits, self.rules)
        if self.activation_sqnr_db is None or self.activation_bits == 16:
            return decided, ()
        alone = plan.assemble(graph_module, decided, {}, floats)
        few = list(observe.tensor_batches(source, min(self.samples, _WIDENING_SAMPLES)))
        noises = sensitivity.measure(graph_module, alone, few)
        chosen = wider.choose(graph_module, noises, 10 ** (-self.activation_sqnr_db / 10))
        left = sum(s.noise for s in noises) - sum(s.noise for s in chosen)
        by_name = {**wider.rules_for(chosen), **self.rules}
        widened = calibrate.activations(graph_module, found, self.activation_bits, by_name)
        return widened, wider.notes(chosen, left)

    def round(
        self,
        graph_module: GraphModule,
        source: DataSource,
        decided: Mapping[str, TensorQuantization],
        floats: Mapping[str, str],
    ) -> dict[str, TensorQuantization]:
        """Weight name -> its integers; mended biases are written into the graph."""
        method = self.method()
        layers = scales.weight_nodes(graph_module)
        bits = rules.weight_bits(graph_module, self.rules, layers)
        others = rules.roundings(graph_module, self.rules, layers)
        plain = self.rounding == "nearest" and method.correction in ("none", "analytic")
        if plain and set(others.values()) <= {"nearest"}:
            weights = plan.weights(graph_module, decided, bits, self.weight_bits)
            if method.correction == "analytic":
                few = observe.tensor_batches(source, min(self.samples, _ROUNDING_SAMPLES))
                analytic.correct_biases(graph_module, weights, few, floats)
            return weights
        wanted = _ROUNDING_SAMPLES + (_CHECKING_SAMPLES if method.correction == "checked" else 0)
        samples = list(observe.tensor_batches(source, min(self.samples, wanted)))
        seen, unseen = samples[:_ROUNDING_SAMPLES], samples[_ROUNDING_SAMPLES:]
        return rounding.round_by_inputs(
            graph_module, seen, decided, floats, self.weight_bits, method, bits, unseen, others
        )


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        said = " or ".join(map(str, allowed)) if len(allowed) == 2 else "one of " + ", ".join(allowed)
        raise InputError(f"{name} is {value!r}; expected {said}")


def calibration_source(data: Data) -> DataSource:
    """Calibration data, or the training data in their place. Raises DataError when there are none."""
    source = data.calibration or data.train
    if source is None or len(source) == 0:
        raise DataError("quantize needs calibration data: give --calib, or data.calibration in the recipe")
    return source


def example_inputs(candidate: Candidate) -> tuple[torch.Tensor, ...]:
    """Zeros of the candidate's input shapes and dtypes, for capturing its graph."""
    return tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in candidate.inputs)
