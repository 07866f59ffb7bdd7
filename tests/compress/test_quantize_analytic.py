"""Analytic bias correction, against outputs of the rounded layer itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgecomp.compress import analytic, plan
from edgecomp.graph import capture, constants

LAYERS = [
    (nn.Conv2d(4, 6, 3), (4, 7, 7)),
    (nn.Conv2d(4, 8, 3, groups=4), (4, 7, 7)),
    (nn.Conv2d(4, 6, 1, stride=2, groups=2), (4, 7, 7)),
    (nn.Conv1d(4, 6, 3), (4, 9)),
    (nn.Linear(4, 6), (5, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=["conv", "depthwise", "grouped", "conv1d", "linear"])
def test_the_mean_output_comes_back(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Inputs that are constant over positions make the mean of each channel exact."""
    axis = -1 if isinstance(layer, nn.Linear) else 0
    level = torch.tensor([3.0, -1.0, 0.5, 8.0])
    x = torch.zeros(2, *shape).transpose(1 + axis if axis >= 0 else axis, -1) + level
    x = x.transpose(1 + axis if axis >= 0 else axis, -1).contiguous()
    graph = capture(nn.Sequential(layer).eval(), (x[:1],))
    weights = plan.weights(graph, {}, {}, 4)
    assert analytic.correct_biases(graph, weights, [(x[:1],), (x[1:],)], {}) == 1
    node = next(n for n in graph.graph.nodes if n.op == "call_function")
    q = weights[str(node.args[1].target)]
    rounded = torch.from_numpy(q.values * q.scale.reshape(-1, *[1] * (q.values.ndim - 1))).float()
    bias = constants.value_of(graph, node.args[2])
    with torch.no_grad():
        expected = layer(x)
        layer.weight.data, layer.bias.data = rounded, bias
        np.testing.assert_allclose(layer(x).numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_layers_that_stay_float_or_have_no_bias_are_left() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)).eval()
    graph = capture(module, (torch.zeros(1, 4),))
    weights = plan.weights(graph, {}, {}, 8)
    samples = [(torch.ones(1, 4),)]
    assert analytic.correct_biases(graph, weights, samples, {"linear": "excluded"}) == 0
