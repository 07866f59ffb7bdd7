"""Equalization and bias absorption: exact in float, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp.compress import channels, equalize
from edgecomp.compress.ptq import Quantize
from edgecomp.graph import capture
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.spec import Candidate, Data, TensorSpec
from tests.compress.test_ptq import Rows


class Residual(nn.Module):
    """Padding, a depthwise layer, a residual group with two readers, and a ReLU6 that must be left alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.project = nn.Conv2d(16, 6, 1)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.one, self.two = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1, bias=False)
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        x = self.project(x)
        x = x + self.body(x)
        return self.head(nn.functional.relu6(self.one(x) + self.two(x)))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.norm = nn.LayerNorm(8)
        self.norm.weight.data = torch.tensor([20.0, 1, 1, 1, 1, 1, 0.1, 1])
        self.norm.bias.data = torch.randn(8)
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.down(torch.relu(self.up(self.q(h) * self.k(h))))


PICTURES = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
WORDS = np.random.default_rng(0).standard_normal((16, 5, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("module", "samples", "count"), [(Residual(), PICTURES, 3), (Normed(), WORDS, 2)], ids=["conv", "norm"]
)
def test_scaling_changes_nothing_in_float(module: nn.Module, samples: np.ndarray, count: int) -> None:
    graph = capture(module.eval(), (torch.from_numpy(samples[:1]),))
    with torch.no_grad():
        before = graph(torch.from_numpy(samples[:1]))
        done = equalize.equalize(graph, lambda: [(torch.from_numpy(s[None]),) for s in samples], 0.5)
        graph.recompile()
        after = graph(torch.from_numpy(samples[:1]))
    assert done == count
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_groups_are_what_may_be_scaled_together() -> None:
    graph = capture(Residual().eval(), (torch.zeros(1, 3, 8, 8),))
    found = channels.groups(graph)
    names = [([n.meta["module"] for n in g.layers], [n.meta["module"] for n in g.readers]) for g in found]
    assert names == [
        (["stem"], ["depthwise"]),
        (["depthwise"], ["project"]),
        (["project", "body"], ["body", "one", "two"]),
    ]
    assert [g.depthwise for g in found] == [True, False, False]


def test_factors_are_those_of_smoothquant() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    module[2].weight.data = torch.tensor([[1.0, -1.0]])
    graph = capture(module, (torch.zeros(1, 2),))
    group = channels.groups(graph)[0]
    found = equalize.factors(graph, group, torch.tensor([8.0, 2.0]), 0.5)
    torch.testing.assert_close(found, torch.tensor([2**0.5, 2**-0.5]))
    dead = equalize.factors(graph, group, torch.tensor([8.0, 0.0]), 1.0)
    torch.testing.assert_close(dead, torch.tensor([1.0, 1.0]))


def test_a_normalization_with_an_outlier_channel_gains() -> None:
    candidate = Candidate(Normed().eval(), (TensorSpec("x", (1, 5, 8)),))
    data = Data(calibration=Rows(WORDS))

    def error(step: Quantize) -> float:
        found = step(candidate, data)
        with torch.no_grad():
            x = torch.from_numpy(WORDS[:1])
            return float((fake_quantize(found.module, found.quantization)(x) - candidate.module(x)).norm())

    assert error(Quantize(rounding="nearest", equalize=0.5)) < 0.8 * error(Quantize(rounding="nearest"))


def test_absorbed_biases_leave_the_function_and_shrink_the_range() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False)).eval()
    module[0].bias.data = torch.tensor([100.0, 0.0, 100.0, -100.0])
    graph = capture(module, (torch.zeros(1, 3, 8, 8),))
    x = torch.from_numpy(PICTURES[:1])
    batches = lambda: [(torch.from_numpy(s[None]),) for s in PICTURES]  # noqa: E731
    assert equalize.fit_weights(graph, batches, 0.0, True) == ("absorbed high biases of 2 channels",)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), module(x), rtol=1e-4, atol=1e-3)
    bias = next(n for n in graph.graph.nodes if n.name == "conv2d").args[2]
    left = getattr(graph, str(bias.target))
    assert float(left[0]) < 10 and float(left[1]) == 0.0 and float(left[3]) == -100.0


def test_biases_before_a_padded_layer_stay() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)).eval()
    module[0].bias.data = torch.full((4,), 100.0)
    graph = capture(module, (torch.zeros(1, 3, 8, 8),))
    assert equalize.absorb_biases(graph, lambda: [(torch.from_numpy(PICTURES[:1]),)]) == 0
