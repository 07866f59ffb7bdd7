"""The fake-quantized graph against numbers computed by hand."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp.graph import capture
from edgecomp.graph.fake_quant import fake_quantize, round_bias, to_integers
from edgecomp.spec import QuantizationPlan, QuantSpec, TensorQuantization

ACTIVATION = QuantSpec()
WEIGHT = QuantSpec(symmetric=True, axis=0, narrow=True)


def scaled(scale: float, zero_point: int) -> TensorQuantization:
    return TensorQuantization(ACTIVATION, np.float32(scale).reshape(()), np.array(zero_point, np.int32))


def linear_plan() -> QuantizationPlan:
    weight = TensorQuantization(
        WEIGHT,
        np.array([0.5, 0.25], np.float32),
        np.zeros(2, np.int32),
        np.array([[2, -1], [4, 127]], np.int8),
    )
    activations = {"x": scaled(0.1, 0), "linear": scaled(0.5, 10)}
    return QuantizationPlan(activations, {"weight": weight})


def linear() -> nn.Linear:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(99.0)  # the plan's integers count, not these
        layer.bias.copy_(torch.tensor([0.12, -0.26]))
    return layer.eval()


class Named(nn.Module):
    """Gives the input its name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_linear_layer_by_hand() -> None:
    """x = [0.31, -20] -> 3, and -128 of -200 (clipped): 0.3, -12.8.

    Weights [[1, -0.5], [1, 31.75]]; bias in steps of 0.05 and 0.025: 0.12 -> 2 -> 0.1, -0.26 -> -10 -> -0.25.
    Row 0: 0.3 + 6.4 + 0.1 = 6.8 -> 6.8 / 0.5 = 13.6 -> 14 -> 7.0.
    Row 1: 0.3 - 406.4 - 0.25 = -406.35 -> clipped at (-128 - 10) * 0.5 = -69.
    """
    plan = linear_plan()
    plan = QuantizationPlan(plan.activations, {"layer.weight": plan.weights["weight"]})
    quantized = fake_quantize(capture(Named(linear()), (torch.zeros(1, 2),)), plan)
    with torch.no_grad():
        found = quantized(torch.tensor([[0.31, -20.0]]))
    np.testing.assert_allclose(found.numpy(), [[7.0, -69.0]], rtol=1e-6)
    assert to_integers(found, plan.activations["linear"]).tolist() == [[24, -128]]


def test_rounding_is_half_to_even_and_zero_stays_zero() -> None:
    graph_module = capture(nn.Identity(), (torch.zeros(1, 4),))
    (door,) = graph_module.graph.find_nodes(op="placeholder")
    quantized = fake_quantize(graph_module, QuantizationPlan({door.name: scaled(1.0, 3)}, {}))
    found = quantized(torch.tensor([[0.5, 1.5, -2.5, 0.0]]))
    assert found.tolist() == [[0.0, 2.0, -2.0, 0.0]]


def test_bias_is_rounded_to_int32_steps() -> None:
    weight = linear_plan().weights["weight"]
    found = round_bias(np.array([0.12, -0.26], np.float32), scaled(0.1, 0), weight)
    np.testing.assert_allclose(found, [0.1, -0.25], rtol=1e-6)


def test_a_float_node_keeps_its_weights() -> None:
    plan = linear_plan()
    named = QuantizationPlan({}, {"layer.weight": plan.weights["weight"]}, {"linear": "excluded"})
    graph_module = capture(Named(linear()), (torch.zeros(1, 2),))
    x = torch.tensor([[0.31, -20.0]])
    with torch.no_grad():
        assert torch.equal(fake_quantize(graph_module, named)(x), graph_module(x))


def test_constants_are_rounded_and_the_original_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.tensor([0.26, 1.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.offset

    graph_module = capture(Net().eval(), (torch.zeros(1, 2),))
    (constant,) = graph_module.graph.find_nodes(op="get_attr")
    quantized = fake_quantize(graph_module, QuantizationPlan({constant.name: scaled(0.1, 0)}, {}))
    x = torch.zeros(1, 2)
    with torch.no_grad():
        np.testing.assert_allclose(quantized(x).numpy(), [[0.3, 1.0]], rtol=1e-6)
        np.testing.assert_allclose(graph_module(x).numpy(), [[0.26, 1.0]], rtol=1e-6)
