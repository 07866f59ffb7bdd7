"""Recovery after pruning: what the removed channels carried is given to those that stay."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from edgecomp.compress import recover, recover_columns
from edgecomp.compress.prune import PruneChannels, prunable, remove
from edgecomp.errors import RecipeError
from edgecomp.spec import Candidate, Data, TensorSpec
from tests.compress.test_ptq import Rows


class Doubled(nn.Module):
    """Channels 8 to 15 of the first layer repeat channels 0 to 7 at half their size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        with torch.no_grad():
            self.a.weight[8:] = self.a.weight[:8] / 2
            self.a.bias[8:] = self.a.bias[:8] / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.b(F.relu(self.a(x))))).mean((2, 3)))


class Neurons(nn.Module):
    """Two linear layers; the second runs twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.Linear(6, 16)
        self.b = nn.Linear(16, 3)
        with torch.no_grad():
            self.a.weight[8:] = self.a.weight[:8] / 2
            self.a.bias[8:] = self.a.bias[:8] / 2

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        return self.b(hidden) + self.b(2 * hidden)


class Grouped(nn.Module):
    """Of each group of the first layer's channels the second half repeats the first at half its size."""

    def __init__(self, second: nn.Module, groups: int) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, padding=1), second, nn.Conv2d(8, 2, 1, bias=False)
        with torch.no_grad():
            for parameter in (self.a.weight, self.a.bias):
                halves = parameter.view(groups, 2, -1, *parameter.shape[1:])
                halves[:, 1] = halves[:, 0] / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.relu(self.a(x)))).mean((2, 3))


PICTURES = np.random.default_rng(0).standard_normal((96, 3, 8, 8)).astype(np.float32)
ROWS = np.random.default_rng(1).standard_normal((256, 6)).astype(np.float32)


def relative_error(result: nn.Module, original: nn.Module, inputs: np.ndarray) -> float:
    with torch.no_grad():
        got, wanted = result(torch.from_numpy(inputs)), original(torch.from_numpy(inputs))
    return float((got - wanted).square().sum() / wanted.square().sum())


def cut(net: nn.Module, inputs: np.ndarray, samples: int = 1000) -> tuple[nn.Module, nn.Module, str]:
    """The net without the second half of its first layer's units: as it is, and recovered, with the note."""
    example = (torch.from_numpy(inputs[:1]),)
    (group,) = (g for g in prunable(net, example).groups if ("a.weight", 0) in g.producers)
    plain = copy.deepcopy(net)
    kept = remove(plain, [(group, np.arange(len(group) // 2, len(group)))])
    mended = copy.deepcopy(plain)
    (note,) = recover.refit(net, mended, kept, Rows(inputs), samples)
    return plain, mended, note


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (Doubled().eval(), PICTURES),
        (Neurons().eval(), ROWS),
        (Grouped(nn.Conv2d(16, 8, 3, groups=2, bias=False), 2).eval(), PICTURES),
        (Grouped(nn.ConvTranspose2d(16, 8, 3, 2), 1).eval(), PICTURES),
    ],
    ids=["convolution", "linear, run twice", "grouped", "transposed"],
)
def test_channels_that_repeat_others_cost_nothing(net: nn.Module, inputs: np.ndarray) -> None:
    plain, mended, note = cut(net, inputs)
    before, after = relative_error(plain, net, inputs), relative_error(mended, net, inputs)
    assert before > 0.01
    assert after < before / 50
    assert "1 layers fitted" in note


def test_the_fit_is_ridge_regression_with_the_bias_as_a_column() -> None:
    net = Neurons().eval()
    _, mended, _ = cut(net, ROWS[:80])
    a, b = (
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy())
        for layer in (net.a, net.b)
    )
    hidden = np.maximum(ROWS[:64] @ a[0].T + a[1], 0)  # the last batch of 16 is kept out
    x = np.pad(np.concatenate([hidden, 2 * hidden])[:, :8], ((0, 0), (0, 1)), constant_values=1)
    wanted = np.concatenate([hidden, 2 * hidden]) @ b[0].T + b[1]
    ridge = 1e-2 * np.mean(np.diag(x.T @ x)) * np.eye(9)
    before = np.column_stack([b[0][:, :8], b[1]])
    expected = np.linalg.solve(x.T @ x + ridge, x.T @ wanted + ridge @ before.T).T
    np.testing.assert_allclose(mended.b.weight.detach().numpy(), expected[:, :-1], atol=1e-5)
    np.testing.assert_allclose(mended.b.bias.detach().numpy(), expected[:, -1], atol=1e-5)


def test_weights_come_back_where_the_fit_does_not_help_on_samples_kept_out_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoilt(pair: Any, batches: list[Any]) -> bool:
        pair.layer.weight.mul_(-3)
        return True

    monkeypatch.setattr(recover, "_fit", spoilt)
    plain, mended, note = cut(Doubled().eval(), PICTURES)
    assert "recovery left out" in note
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, mended.state_dict()[name])


def test_a_layer_that_sees_only_zeros_is_left_as_it_is() -> None:
    plain, mended, _ = cut(Neurons().eval(), np.zeros((64, 6), np.float32) - 1e-30)
    assert torch.isfinite(mended.b.weight).all()
    assert plain.b.weight.shape == mended.b.weight.shape


def test_without_samples_weights_stay() -> None:
    net = Doubled().eval()
    result = PruneChannels(sparsity=0.5)(Candidate(net, (TensorSpec("x", (1, 3, 8, 8)),)), Data())
    assert not any("recovery" in note for note in result.history[-1].notes)


def test_an_unknown_recovery_is_refused() -> None:
    with pytest.raises(RecipeError, match="least-squares or none"):
        PruneChannels(sparsity=0.5, recovery="some")  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 2),
    st.sampled_from([0, 1, 2, "same"]), st.sampled_from(["zeros", "reflect", "replicate"]), st.booleans(),
)  # fmt: skip
def test_columns_times_weights_are_the_convolution(
    kernel: int, stride: int, dilation: int, padding: int | str, mode: str, flat: bool
) -> None:
    torch.manual_seed(0)
    kind: Any = nn.Conv1d if flat else nn.Conv2d
    if padding == "same":  # torch refuses strides, and warns of kernels that need one side more
        kernel, stride = 2 * kernel - 1, 1
    layer = kind(2, 3, kernel, stride, padding, dilation, bias=False, padding_mode=mode)
    x = torch.randn(2, 2, 9) if flat else torch.randn(2, 2, 9, 8)
    with torch.no_grad():
        product = recover_columns.columns(layer, x) @ recover_columns.matrix(layer).T
        torch.testing.assert_close(product, recover_columns.flat(layer, layer(x)), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(0, 1),
    st.booleans(),
)
def test_columns_times_weights_are_the_transposed_convolution(
    kernel: int, stride: int, dilation: int, padding: int, extra: int, flat: bool
) -> None:
    torch.manual_seed(0)
    kind: Any = nn.ConvTranspose1d if flat else nn.ConvTranspose2d
    extra = min(extra, max(stride, dilation) - 1)
    layer = kind(2, 3, kernel, stride, padding, extra, bias=False, dilation=dilation)
    x = torch.randn(2, 2, 7) if flat else torch.randn(2, 2, 7, 6)
    with torch.no_grad():
        product = recover_columns.columns(layer, x) @ recover_columns.matrix(layer).T
        torch.testing.assert_close(product, recover_columns.flat(layer, layer(x)), rtol=1e-4, atol=1e-5)
        before = layer.weight.clone()
        recover_columns.put(layer, recover_columns.matrix(layer).clone() * 2)
    torch.testing.assert_close(layer.weight.detach(), before * 2)


def test_the_groups_of_a_convolution_are_its_columns_in_turn() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, 3, groups=2, bias=False)
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        parts = recover_columns.columns(layer, x).unflatten(1, (2, -1))
        weights = recover_columns.matrix(layer).unflatten(0, (2, -1))
        product = torch.cat([parts[:, g] @ weights[g].T for g in range(2)], dim=1)
        torch.testing.assert_close(product, recover_columns.flat(layer, layer(x)), rtol=1e-4, atol=1e-5)
