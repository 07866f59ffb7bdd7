"""Which values share a scale, which have a prescribed one, and what the plan holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from edgecomp.compress import plan, scales
from edgecomp.graph import capture
from edgecomp.spec import QuantSpec


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def captured(function: Callable[[Tensor], Tensor], x: Tensor) -> GraphModule:
    return capture(Function(function), (x,))


def same(groups: scales.ScaleGroups, *names: str) -> bool:
    return len({groups.find(n) for n in names}) == 1


IMAGE = torch.zeros(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: F.max_pool2d(x, 2), "max_pool2d"),
        (lambda x: F.avg_pool2d(x, 2), "avg_pool2d"),
        (lambda x: x.reshape(1, 32), "reshape"),
        (lambda x: x.permute(0, 2, 3, 1), "permute"),
        (lambda x: x[:, :1], "slice"),
        (lambda x: F.pad(x, (1, 1)), "constant_pad_nd"),
        (lambda x: F.interpolate(x, scale_factor=2), "upsample_nearest2d"),
    ],
)
def test_moving_values_keeps_their_scale(function: Callable[[Tensor], Tensor], name: str) -> None:
    graph_module = captured(lambda x: function(torch.exp(x)), IMAGE)
    last = [n for n in graph_module.graph.nodes if n.op == "call_function"][-1]
    groups = scales.group(graph_module, 8)
    assert same(groups, "exp", last.name) and not same(groups, "x", "exp"), name


def test_concatenation_shares_one_scale() -> None:
    groups = scales.group(captured(lambda x: torch.cat([x.exp(), x.abs()], 1), IMAGE), 8)
    assert same(groups, "exp", "abs_1", "cat")


def test_concatenating_a_prescribed_scale_requantizes_it() -> None:
    groups = scales.group(captured(lambda x: torch.cat([x.sigmoid(), x.exp()], 1), IMAGE), 8)
    assert same(groups, "exp", "cat") and not same(groups, "sigmoid", "cat")
    assert groups.prescribed[groups.find("sigmoid")] == (1 / 256, -128)


def test_a_prescribed_scale_follows_a_single_reader() -> None:
    groups = scales.group(captured(lambda x: F.max_pool2d(x.sigmoid(), 2).reshape(1, 8), IMAGE), 8)
    decided = plan.activations(groups, {"x": (-1.0, 1.0)}, QuantSpec())
    assert float(decided["max_pool2d"].scale) == 1 / 256 == float(decided["sigmoid"].scale)
    assert int(decided["max_pool2d"].zero_point) == -128


@pytest.mark.parametrize(
    ("function", "bits", "expected"),
    [
        (lambda x: x.softmax(-1), 8, (1 / 256, -128)),
        (torch.sigmoid, 8, (1 / 256, -128)),
        (torch.tanh, 8, (1 / 128, 0)),
        (torch.tanh, 16, (1 / 32768, 0)),
    ],
)
def test_prescribed_scales(
    function: Callable[[Tensor], Tensor], bits: int, expected: tuple[float, int]
) -> None:
    graph_module = captured(function, torch.zeros(1, 4))
    groups = scales.group(graph_module, bits)
    assert list(groups.prescribed.values()) == [expected]


def test_a_group_takes_the_union_of_its_ranges() -> None:
    groups = scales.group(captured(lambda x: torch.cat([x.exp(), x.abs()], 1), IMAGE), 8)
    seen = {"x": (0.0, 1.0), "exp": (-1.0, 4.0), "abs_1": (0.0, 20.0), "cat": (0.0, 20.0)}
    decided = plan.activations(groups, seen, QuantSpec())
    assert decided["exp"] is decided["cat"] is decided["abs_1"]
    assert float(decided["cat"].scale) == np.float32(21 / 255)


def test_fused_values_and_weights_have_no_activation_scale() -> None:
    graph_module = capture(nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU()).eval(), (IMAGE,))
    assert [n.op for n in scales.scaled_nodes(graph_module)] == ["placeholder", "call_function"]
    assert list(scales.weight_nodes(graph_module)) == ["0.weight"]


def test_operations_without_an_integer_kernel_are_listed() -> None:
    graph_module = captured(lambda x: torch.erf(x) + 1, torch.zeros(1, 4))
    assert scales.without_kernel(graph_module) == {"erf": "no integer kernel for aten.erf.default"}


def test_weights_are_rounded_per_channel() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.27, -0.5], [0.0, 2.54]]))
    graph_module = capture(layer.eval(), (torch.zeros(1, 2),))
    found = plan.weights(graph_module, {}, {}, 8)["weight"]
    assert found.values is not None and found.values.dtype == np.int8
    assert found.values.tolist() == [[127, -50], [0, 127]]
    np.testing.assert_allclose(found.scale, [0.01, 0.02], rtol=1e-6)


def test_a_grouped_transposed_convolution_has_one_weight_scale() -> None:
    graph_module = capture(nn.ConvTranspose2d(2, 4, 2, groups=2).eval(), (IMAGE,))
    (found,) = plan.weights(graph_module, {}, {}, 8).values()
    assert found.scale.shape == ()


def test_excluded_layers_lose_their_weights_and_unread_scales() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    graph_module = capture(module, (torch.zeros(1, 4),))
    groups = scales.group(graph_module, 8)
    decided = plan.activations(groups, dict.fromkeys(groups.root, (-1.0, 1.0)), QuantSpec())
    weights = plan.weights(graph_module, decided, {}, 8)
    found = plan.assemble(graph_module, decided, weights, {"linear": "excluded"})
    assert set(found.weights) == {"1.weight"} and found.float_nodes == {"linear": "excluded"}
    (door,) = graph_module.graph.find_nodes(op="placeholder")
    assert set(found.activations) == {"linear", "linear_1"} and door.name not in found.activations


def test_arithmetic_on_whole_numbers_stays_float() -> None:
    """An index has no scale, so what multiplies it computes in float and is listed."""

    class Positions(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.relu(ids * 0.5)

    graph_module = capture(Positions(), (torch.zeros(1, 4, dtype=torch.int64),))
    left = scales.without_kernel(graph_module)
    assert list(left.values()) == ["aten.mul.Tensor reads whole numbers that have no scale"]


def test_a_value_that_only_pools_read_needs_what_comes_out_of_them() -> None:
    """The largest of each window lies in (-1, 3): what is smaller never comes out."""
    graph_module = captured(lambda x: F.max_pool2d(torch.exp(x), 2), IMAGE)
    found = {"x": (-9.0, 9.0), "exp": (-8.0, 3.0), "max_pool2d": (-1.0, 3.0)}
    assert scales.behind_pools(graph_module, found) == {**found, "exp": (-1.0, 3.0)}
    both = captured(lambda x: F.max_pool2d(y := torch.exp(x), 2).sum() + y.sum(), IMAGE)
    assert scales.behind_pools(both, found)["exp"] == (-8.0, 3.0)
