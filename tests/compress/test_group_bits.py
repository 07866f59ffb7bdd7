"""Widths of weights under a budget: costs against what rounding really does, allocation by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgecomp.compress import group_bits
from edgecomp.compress.group_bits import Choice, Curvature, allocated
from edgecomp.compress.groupwise import QuantizeWeights
from edgecomp.errors import DataError, InputError
from edgecomp.graph import capture
from edgecomp.numerics import groupwise
from edgecomp.spec import Candidate, Data, TensorSpec
from tests.compress.test_ptq import Rows

aten = torch.ops.aten


class Two(nn.Module):
    """y = 10 * loud(x) + quiet(x): rounding `loud` costs a hundred times as much."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.quiet = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 10.0 * self.loud(x) + self.quiet(x)


def rows() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)


def curvatures(module: nn.Module, samples: list[tuple[Tensor, ...]]) -> dict[str, Curvature]:
    graph = capture(module, samples[0])
    layers = [n for n in graph.graph.nodes if n.target in (aten.linear.default, aten.embedding.default)]
    return group_bits.measured(graph, layers, samples)[0]


@torch.no_grad()
def test_the_cost_is_the_squared_error_of_the_outputs() -> None:
    """Of a linear model with white inputs it is exact but for the draws of signs and inputs."""
    samples = [(torch.from_numpy(r[None]),) for r in rows()]
    found = curvatures(Two().eval(), samples)
    error = np.random.default_rng(1).standard_normal((32, 64)) * 0.01
    x = torch.from_numpy(rows()).double()
    everything = np.arange(32)
    for name, loudness in (("loud.weight", 10.0), ("quiet.weight", 1.0)):
        true = float((loudness * x @ torch.from_numpy(error).T).square().sum(1).mean())
        assert found[name].cost(error, everything) == pytest.approx(true, rel=0.2)


class Head(nn.Module):
    """ids -> scores of the table's rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(12, 16), nn.Linear(16, 12, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


@torch.no_grad()
def test_the_cost_of_a_language_model_is_twice_the_divergence() -> None:
    module = Head().eval()
    samples = [
        (torch.randint(0, 12, (1, 40), generator=torch.Generator().manual_seed(i)),) for i in range(40)
    ]
    graph = capture(module, samples[0])
    layers = [n for n in graph.graph.nodes if n.target in (aten.linear.default, aten.embedding.default)]
    with torch.enable_grad():
        found, tokens = group_bits.measured(graph, layers, samples)
    assert tokens
    errors = torch.Generator().manual_seed(5)
    costs, divergences = [], []
    for _ in range(20):
        off = torch.randn(12, 16, generator=errors) * 0.02
        costs.append(found["head.weight"].cost(off.double().numpy(), np.arange(12)))
        before = [torch.log_softmax(module(*s), -1) for s in samples]
        module.head.weight += off
        after = [torch.log_softmax(module(*s), -1) for s in samples]
        module.head.weight -= off
        kl = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(before, after, strict=True)]
        divergences.append(np.mean(kl))
    assert np.mean(costs) / 2 == pytest.approx(np.mean(divergences), rel=0.25)


def test_a_head_costs_what_its_frequent_tokens_cost() -> None:
    """Of 5,000 rows three carry all of the gradient, between those that are tried evenly."""
    outputs = np.zeros(5000)
    outputs[[13, 1777, 4002]] = [0.5, 0.3, 0.2]
    curvature = Curvature(outputs, np.array([2.0, 4.0]))
    rows = curvature.rows(5000)
    assert {13, 1777, 4002} <= set(rows) and len(rows) < 500
    error = np.full((len(rows), 2), 0.1)
    assert curvature.cost(error, rows) == pytest.approx(0.01 * (2 + 4) * 1.0)


@torch.no_grad()
def test_a_tied_table_has_the_cost_of_both_its_readers() -> None:
    module = Head().eval()
    module.head.weight = module.table.weight
    samples = [(torch.arange(12)[None],)]
    graph = capture(module, samples[0])
    layers = [n for n in graph.graph.nodes if n.target in (aten.linear.default, aten.embedding.default)]
    with torch.enable_grad():
        found, _ = group_bits.measured(graph, layers, samples)
    (both,) = found.values()
    error, rows = np.full((12, 16), 0.1), np.arange(12)
    parts = [Curvature(both.outputs, both.inputs), Curvature(table=both.table)]
    costs = [part.cost(error, rows) for part in parts]
    assert min(costs) > 0 and both.cost(error, rows) == pytest.approx(sum(costs))


options = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 99)), min_size=1, max_size=4), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(options, st.integers(4, 40))
def test_the_allocation_fits_and_no_single_change_is_better(
    drawn: list[list[tuple[int, int]]], budget: int
) -> None:
    """It is on the hull, so within one step of the best; never over the budget."""
    hulls = {}
    for index, pairs in enumerate(drawn):
        sizes = sorted(dict(pairs).items())
        hulls[str(index)] = group_bits._hull([Choice(s, float(s), float(c)) for s, c in sizes])
    least = sum(h[0].size_bytes for h in hulls.values())
    if least > budget:
        with pytest.raises(InputError, match="size_budget"):
            allocated(hulls, size_bytes=budget)
        return
    found = allocated(hulls, size_bytes=budget)
    cost = sum(c.cost for c in found.values())
    assert sum(c.size_bytes for c in found.values()) <= budget
    best = min(
        sum(c.cost for c in combination)
        for combination in itertools.product(*hulls.values())
        if sum(c.size_bytes for c in combination) <= budget
    )
    largest = max((a.cost - b.cost for h in hulls.values() for a, b in itertools.pairwise(h)), default=0.0)
    assert best <= cost <= best + largest * len(hulls)
    enough = allocated(hulls, cost=cost)
    assert sum(c.cost for c in enough.values()) <= cost


def test_a_budget_gives_more_bits_to_what_matters() -> None:
    candidate = Candidate(Two().eval(), (TensorSpec("x", (1, 64)),))
    data = Data(calibration=Rows(rows()))
    budget = 2 * 32 * 64 * 5 // 8 + 4 * 2 * 64
    made = QuantizeWeights(method="rtn", size_budget=budget)(candidate, data)
    assert made.quantization is not None
    bits = {name: q.spec.bits for name, q in made.quantization.weights.items()}
    assert bits["loud.weight"] > bits["quiet.weight"]
    size = sum(q.values.size * q.spec.bits / 8 + 2 * q.scale.size for q in made.quantization.weights.values())  # type: ignore[union-attr]
    assert size <= budget
    assert any("predicted squared error" in note for note in made.history[-1].notes)


@torch.no_grad()
def test_a_budget_of_error_is_what_the_outputs_then_lose() -> None:
    module, x = Two().eval(), torch.from_numpy(rows())
    candidate = Candidate(module, (TensorSpec("x", (1, 64)),))
    step = QuantizeWeights(method="rtn", error_budget=0.1)
    made = step(candidate, Data(calibration=Rows(rows())))
    assert made.quantization is not None
    before = module(x)
    state = {
        n: torch.from_numpy(groupwise.restore(q.values, q.scale, q.zero_point))  # type: ignore[arg-type]
        for n, q in made.quantization.weights.items()
    }
    module.load_state_dict(state)
    lost = float((module(x) - before).square().sum(1).mean())
    assert 0.01 < lost < 0.13


def test_budgets_are_checked() -> None:
    candidate = Candidate(Two().eval(), (TensorSpec("x", (1, 64)),))
    with pytest.raises(InputError, match="both set"):
        QuantizeWeights(size_budget=10, error_budget=1.0)
    with pytest.raises(InputError, match="expected more than 0"):
        QuantizeWeights(size_budget=0)
    with pytest.raises(InputError, match="expected some of 2, 3, 4, 6, 8"):
        QuantizeWeights(widths=(5,))
    with pytest.raises(DataError, match="needs calibration data"):
        QuantizeWeights(method="rtn", size_budget=4000)(candidate, Data())
    with pytest.raises(InputError, match="the weights take"):
        QuantizeWeights(method="rtn", size_budget=100)(candidate, Data(calibration=Rows(rows())))
