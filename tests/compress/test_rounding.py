"""Rounding by inputs: what each layer is decided from, and what it brings."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp.compress import biases, columns, observe, plan, rounding, scales, stream
from edgecomp.compress.ptq import Quantize
from edgecomp.errors import InputError
from edgecomp.graph import capture, constants
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.numerics.metrics import sqnr_db
from edgecomp.spec import QuantizationPlan, TensorQuantization


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.project = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + torch.nn.functional.relu6(self.depthwise(x))
        return self.head(torch.relu(self.project(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def samples() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(1, 3, 16, 16, generator=generator) + 1.0,) for _ in range(24)]


@pytest.fixture(scope="module")
def graph_module() -> torch.fx.GraphModule:
    torch.manual_seed(1)
    return capture(Net(), (torch.zeros(1, 3, 16, 16),))


@pytest.fixture(scope="module")
def decided(
    graph_module: torch.fx.GraphModule, samples: list[tuple[Tensor, ...]]
) -> dict[str, TensorQuantization]:
    groups = scales.group(graph_module, 8)
    spec = plan.activation_spec(8)
    ranges = observe.observe(
        graph_module, lambda: samples, list(groups.root), spec, observe.ObserverSettings()
    )
    return plan.activations(groups, ranges, spec)


@pytest.mark.parametrize(("bits", "margin_db"), [(4, 1.0), (8, 0.0)])
def test_beats_nearest_on_new_samples(
    graph_module: torch.fx.GraphModule,
    decided: dict[str, TensorQuantization],
    samples: list[tuple[Tensor, ...]],
    bits: int,
    margin_db: float,
) -> None:
    generator = torch.Generator().manual_seed(7)
    fresh = [torch.randn(1, 3, 16, 16, generator=generator) + 1.0 for _ in range(32)]
    reference = np.concatenate([graph_module(x).numpy() for x in fresh])

    def quality(module: torch.fx.GraphModule, weights: dict[str, TensorQuantization]) -> float:
        rounded = fake_quantize(module, plan.assemble(module, decided, weights, {}))
        return sqnr_db(reference, np.concatenate([rounded(x).numpy() for x in fresh]))

    mended = copy.deepcopy(graph_module)
    ours = rounding.round_by_inputs(mended, samples, decided, {}, bits)
    nearest = plan.weights(graph_module, decided, {}, bits)
    assert quality(mended, ours) > quality(graph_module, nearest) + margin_db


def test_mended_bias_restores_the_mean_output(
    graph_module: torch.fx.GraphModule,
    decided: dict[str, TensorQuantization],
    samples: list[tuple[Tensor, ...]],
) -> None:
    """After the last layer the mean over the calibration samples is the float model's, rounding aside."""
    mended = copy.deepcopy(graph_module)
    weights = rounding.round_by_inputs(mended, samples, decided, {}, 4)
    rounded = fake_quantize(mended, plan.assemble(mended, decided, weights, {}))
    ours = torch.cat([rounded(*s) for s in samples]).mean(0)
    exact = torch.cat([graph_module(*s) for s in samples]).mean(0)
    step = float(decided[mended.graph.find_nodes(op="output")[0].args[0][0].name].scale)
    assert float((ours - exact).abs().max()) < step


def test_excluded_layers_keep_their_weights(
    graph_module: torch.fx.GraphModule,
    decided: dict[str, TensorQuantization],
    samples: list[tuple[Tensor, ...]],
) -> None:
    layer = next(
        n for n in graph_module.graph.nodes if n.meta.get("module") == "project" and n.op != "get_attr"
    )
    weights = rounding.round_by_inputs(
        copy.deepcopy(graph_module), samples, decided, {layer.name: "excluded"}, 8
    )
    assert str(layer.args[1].target) not in weights


def test_stream_gives_each_layer_its_true_inputs(
    graph_module: torch.fx.GraphModule,
    decided: dict[str, TensorQuantization],
    samples: list[tuple[Tensor, ...]],
) -> None:
    """With nothing decided, float and quantized inputs differ by the rounding of what came before only."""
    seen: dict[str, stream.Layer] = {}

    def keep(layer: stream.Layer) -> tuple[Tensor, None]:
        seen[layer.node.meta["module"]] = layer
        return getattr_path(graph_module, str(layer.node.args[1].target)), None

    stream.run(graph_module, samples[:2], decided, keep)
    assert list(seen) == ["stem", "depthwise", "project", "head"]
    exact = torch.relu(torch.nn.functional.conv2d(samples[0][0], *parameters(graph_module, "stem"), 2, 1))
    assert torch.allclose(seen["depthwise"].float_inputs[0], exact, atol=1e-5)
    step = float(decided[seen["depthwise"].node.args[0].name].scale)
    assert 0 < float((seen["depthwise"].inputs[0] - exact).abs().max()) < 4 * step


def getattr_path(module: torch.fx.GraphModule, path: str) -> Tensor:
    return module.get_parameter(path) if path in dict(module.named_parameters()) else module.get_buffer(path)


def parameters(module: torch.fx.GraphModule, name: str) -> tuple[Tensor, Tensor]:
    return getattr_path(module, f"{name}.weight"), getattr_path(module, f"{name}.bias")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(6, 9, 3, 2, 1), (1, 6, 11, 9)),
        (nn.Conv2d(6, 12, (3, 1), 1, (2, 0), dilation=(2, 1), groups=3), (1, 6, 12, 7)),
        (nn.Conv2d(6, 6, 3, 1, 1, groups=6), (1, 6, 10, 10)),
        (nn.Conv2d(6, 4, 1, 2), (1, 6, 9, 9)),
        (nn.Conv1d(4, 6, 5, 2, 2), (1, 4, 31)),
        (nn.Linear(7, 3), (1, 5, 7)),
    ],
)
def test_columns_times_matrices_is_the_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    graph_module = capture(layer, (torch.zeros(shape),))
    node = next(n for n in graph_module.graph.nodes if n.target in columns._SUPPORTED)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    unfolded = columns.columns(x, node)
    matrices = torch.from_numpy(columns.as_matrices(layer.weight.detach().numpy(), node))
    product = (matrices @ unfolded).flatten(0, 1) + layer.bias.detach()[:, None]
    expected = layer(x).detach()
    expected = expected.flatten(0, 1).T if isinstance(layer, nn.Linear) else expected[0].flatten(1)
    assert torch.allclose(product, expected, atol=1e-5)


def test_rounding_is_named() -> None:
    with pytest.raises(
        InputError, match=r"rounding is 'best'; expected one of nearest, sequential-mse, gptq, descent"
    ):
        Quantize(rounding="best")  # type: ignore[arg-type]


def test_biases_are_checked_on_samples_that_did_not_mend_them() -> None:
    """Of two sets of biases the one nearer to the float graph on the samples given is kept."""
    graph_module = capture(nn.Linear(3, 2), (torch.zeros(1, 3),))
    layer = next(n for n in graph_module.graph.nodes if n.op == "call_function")
    own = constants.value_of(graph_module, layer.args[2])
    wrong, right = {layer.name: own + 0.5}, {layer.name: own + 0.01}
    nothing = QuantizationPlan({}, {}, {})
    for first, second in ((wrong, right), (right, wrong)):
        assert biases.quieter(graph_module, nothing, (first, second), [(torch.ones(1, 3),)]) is right
    assert layer.args[2].name in {n.name for n in graph_module.graph.nodes}
    biases.write(graph_module, right)
    with torch.no_grad():
        found = graph_module(torch.zeros(1, 3))
    torch.testing.assert_close(found if isinstance(found, torch.Tensor) else found[0], (own + 0.01)[None])
