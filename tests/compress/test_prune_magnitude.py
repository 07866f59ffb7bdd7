from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgecomp.compress.magnitude import PruneMagnitude, n_of_m, zero_n_of_m, zero_smallest
from edgecomp.errors import RecipeError
from edgecomp.spec import Candidate, Data, TensorSpec


def test_two_of_four_by_hand() -> None:
    weight = torch.tensor([[3.0, -1.0, 0.5, 2.0], [0.0, -4.0, 4.0, 5.0]])
    assert zero_n_of_m(weight, 2, 4)
    assert torch.equal(weight, torch.tensor([[3.0, 0.0, 0.0, 2.0], [0.0, 0.0, 4.0, 5.0]]))


def test_global_scope_compares_layers_and_layer_scope_does_not() -> None:
    small, large = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    zero_smallest([small, large], 0.5, "global")
    assert small.tolist() == [0.0, 0.0] and large.tolist() == [3.0, 4.0]
    small, large = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    zero_smallest([small, large], 0.5, "layer")
    assert small.tolist() == [0.0, 2.0] and large.tolist() == [0.0, 4.0]


@given(st.floats(0.05, 0.95), st.integers(1, 60))
def test_exactly_the_fraction_becomes_zero(sparsity: float, count: int) -> None:
    weight = torch.arange(1.0, count + 1)
    zero_smallest([weight], sparsity, "global")
    assert int((weight == 0).sum()) == round(count * sparsity)


def test_step_leaves_excluded_layers_dense_and_says_so() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    candidate = Candidate(module, (TensorSpec("x", (1, 8)),))
    result = PruneMagnitude(pattern="2:4", exclude=("2",))(candidate, Data())
    assert int((result.module[0].weight == 0).sum()) == 32
    assert not (result.module[2].weight == 0).any() and not (module[0].weight == 0).any()
    assert "2 not pruned: excluded" in result.history[-1].notes


def test_rules_by_name_go_before_those_by_type_and_both_before_the_sparsity() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 10), nn.Conv1d(10, 4, 1), nn.Conv1d(4, 5, 1))
    start = Candidate(module.eval(), (TensorSpec("x", (1, 8)),))
    rules = {"type:Linear": 0.5, "1": 0.1, "3": 0.0}
    pruned = PruneMagnitude(sparsity=0.75, rules=rules)(start, Data()).module
    assert [int((layer.weight == 0).sum()) for layer in pruned] == [40, 10, 30, 0]


def test_rules_that_cannot_hold() -> None:
    start = Candidate(nn.Sequential(nn.Linear(8, 8)).eval(), (TensorSpec("x", (1, 8)),))
    with pytest.raises(RecipeError, match="rule 'head.*' matches no layer; first are 0; types are Linear"):
        PruneMagnitude(sparsity=0.5, rules={"head.*": 0.1})(start, Data())
    with pytest.raises(RecipeError, match="none beside pattern"):
        PruneMagnitude(pattern="2:4", rules={"0": 0.1})
    with pytest.raises(RecipeError, match="is 1.5; expected a sparsity"):
        PruneMagnitude(sparsity=0.5, rules={"0": 1.5})


def test_n_of_m_that_does_not_divide_is_listed() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).eval()
    result = PruneMagnitude(pattern="2:4")(Candidate(module, (TensorSpec("x", (1, 6)),)), Data())
    assert "0 not pruned: 6 inputs are no multiple of 4" in result.history[-1].notes


def test_bad_patterns() -> None:
    for text in ("4", "4:2", "0:4", "a:b"):
        with pytest.raises(RecipeError, match="expected N:M"):
            n_of_m(text)
    with pytest.raises(RecipeError, match="expected one of the two"):
        PruneMagnitude(sparsity=0.5, pattern="2:4")
