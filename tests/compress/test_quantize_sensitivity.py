"""Sensitivity: the cost of each rounding alone, against graphs rounded by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgecomp.compress import sensitivity
from edgecomp.compress.ptq import Quantize
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.spec import QuantizationPlan
from tests.compress.test_ptq import PICTURES, quantized

SAMPLES = [(torch.from_numpy(p[None]),) for p in PICTURES[:4]]


def test_every_rounding_is_measured_as_a_plan_of_it_alone_would_be() -> None:
    made = quantized(Quantize(rounding="nearest", weight_bits=4))
    plan = made.quantization
    found = sensitivity.measure(made.module, plan, SAMPLES)
    assert {s.name for s in found if s.kind == "weight"} == set(plan.weights)
    assert {n for s in found if s.kind == "activation" for n in s.nodes} == set(plan.activations)
    assert [s.noise for s in found] == sorted((s.noise for s in found), reverse=True)
    for each in found:
        chosen = {n: plan.activations[n] for n in each.nodes} if each.kind == "activation" else {}
        weights = {each.name: plan.weights[each.name]} if each.kind == "weight" else {}
        alone = fake_quantize(made.module, QuantizationPlan(chosen, weights, {}))
        with torch.no_grad():
            exact = torch.cat([made.module(*s) for s in SAMPLES]).double()
            error = torch.cat([alone(*s) for s in SAMPLES]).double() - exact
        expected = float(error.square().sum() / exact.square().sum())
        assert each.noise == pytest.approx(expected, rel=1e-3)
        assert each.sqnr_db == pytest.approx(-10 * math.log10(expected), abs=0.01)


def test_noises_add_up_to_the_noise_of_the_plan() -> None:
    made = quantized(Quantize(rounding="nearest", weight_bits=4))
    total = sum(s.noise for s in sensitivity.measure(made.module, made.quantization, SAMPLES))
    rounded = fake_quantize(made.module, made.quantization)
    with torch.no_grad():
        exact = torch.cat([made.module(*s) for s in SAMPLES])
        error = torch.cat([rounded(*s) for s in SAMPLES]) - exact
    assert total == pytest.approx(float(error.square().sum() / exact.square().sum()), rel=0.8)


def test_worst_takes_the_fewest_that_must_go() -> None:
    def entry(kind: str, noise: float) -> sensitivity.Sensitivity:
        return sensitivity.Sensitivity(kind, str(noise), "", (), 8, 1, noise)  # type: ignore[arg-type]

    found = [
        entry("activation", 4.0),
        entry("weight", 3.0),
        entry("activation", 2.0),
        entry("activation", 1.0),
    ]
    assert [s.noise for s in sensitivity.worst(found, "activation", 5.0)] == [4.0, 2.0]
    assert [s.noise for s in sensitivity.worst(found, "activation", 6.0)] == [4.0]
    assert sensitivity.worst(found, "activation", 10.0) == []


def test_no_noise_is_an_infinite_ratio() -> None:
    assert sensitivity.decibels(0.0) == math.inf
    assert sensitivity.decibels(0.01) == pytest.approx(20.0)
    assert np.isfinite(sensitivity.decibels(1e-9))
