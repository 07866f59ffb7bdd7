"""Ranges chosen at the outputs: a clipped tail is kept where the model reads it, cut where it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgecomp.compress import calibrate, observe, output_ranges, plan, rounding, scales
from edgecomp.graph import capture
from tests.compress.test_ptq import Rows


class Tail(nn.Module):
    """Two branches of one input; the first reads its large values, the second saturates there."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :4] * 3.0, torch.tanh((x[:, 4:] * 3.0) / 3.0)], 1)


def test_a_tail_is_cut_only_where_the_output_does_not_feel_it() -> None:
    graph_module = capture(Tail(), (torch.zeros(1, 8),))
    groups = scales.group(graph_module, 8)
    names = [n.name for n in scales.scaled_nodes(graph_module) if n.op == "call_function"]
    loud, quiet = (n for n in names if n.startswith("mul"))
    widest = dict.fromkeys(groups.root, (-30.0, 30.0))
    clipped = {**widest, loud: (-9.0, 9.0), quiet: (-9.0, 9.0)}
    samples = [(torch.linspace(-10, 10, 8)[None],), (torch.tensor([[9.0, -9, 8, 1, 9, -9, 0.3, 0.2]]),)]
    found = output_ranges.choose(graph_module, groups, widest, clipped, plan.activation_spec(8), samples)
    assert found[loud] == (-30.0, 30.0)
    assert found[quiet] == (-9.0, 9.0)


def test_long_graphs_are_judged_on_fewer_samples() -> None:
    def made(count: int) -> scales.ScaleGroups:
        return scales.ScaleGroups({str(i): str(i) for i in range(count)})

    assert [output_ranges.samples_for(made(n)) for n in (1, 200, 400, 5000)] == [8, 8, 4, 1]


def test_both_ranges_come_from_one_look() -> None:
    graph_module = capture(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (torch.zeros(1, 4),))
    rows = [(torch.randn(1, 4, generator=torch.Generator().manual_seed(i)),) for i in range(50)]
    spec, names = plan.activation_spec(8), _names(graph_module)
    widest, clipped = observe.widest_and_clipped(
        graph_module, lambda: rows, names, spec, observe.ObserverSettings("mse")
    )
    values = torch.cat([r[0] for r in rows])
    assert widest[names[0]] == (float(values.min()), float(values.max()))
    assert clipped == observe.observe(
        graph_module, lambda: rows, names, spec, observe.ObserverSettings("mse")
    )


def _names(graph_module: torch.fx.GraphModule) -> list[str]:
    return [n.name for n in scales.scaled_nodes(graph_module) if n.op in ("placeholder", "call_function")]


def test_a_drift_that_one_sample_makes_is_left_alone() -> None:
    """Channel 0 drifts alike in all samples, channel 1 in one of four: 1 - s^2 / (n m^2) = 0."""
    drifts = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 4.0]])
    np.testing.assert_allclose(rounding.agreed(drifts), [1.0, 0.0], atol=1e-12)
    assert rounding.agreed(np.array([[0.5]])) == 0.5


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40))
def test_agreed_is_a_smaller_mean_of_the_same_sign(seed: int, count: int) -> None:
    drifts = np.random.default_rng(seed).normal(0.3, 1, (count, 5))
    found, mean = rounding.agreed(drifts), drifts.mean(0)
    assert (np.abs(found) <= np.abs(mean) + 1e-12).all() and (found * mean >= 0).all()


@pytest.mark.parametrize("observer", ["minmax", "output"])
def test_outputs_get_room_for_unseen_samples_and_inner_values_do_not(observer: observe.Observer) -> None:
    """One output in 300 would go beyond what 40 samples gave; a hidden layer's range is what was seen."""
    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)).eval()
    graph_module = capture(module, (torch.zeros(1, 4),))
    seen = calibrate.calibrate(
        graph_module, Rows(rows.numpy()), 40, 8, observe.ObserverSettings(observer)
    ).ranges
    with torch.no_grad():
        hidden, outputs = module[1](module[0](rows)), module(rows)
    low, high = seen["linear_1"]
    assert low < float(outputs.min()) and high > float(outputs.max())
    assert high - low < 2.5 * float(outputs.max() - outputs.min())
    assert seen["relu"][1] <= float(hidden.max()) + 1e-5
