"""The canonical graph computes what the module computes, in the vocabulary that the targets know."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from edgecomp.errors import ModelError
from edgecomp.graph import capture, constants, fused_into

aten = torch.ops.aten


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def calls(graph_module: GraphModule) -> list[object]:
    return [n.target for n in graph_module.graph.nodes if n.op == "call_function"]


def values(graph_module: GraphModule) -> list[Tensor]:
    nodes = graph_module.graph.find_nodes(op="get_attr")
    return [constants.value_of(graph_module, n) for n in nodes]


def captured(module: nn.Module, *inputs: Tensor) -> GraphModule:
    """Capture, and check against the module on other values of the same shapes."""
    module = module.eval()
    graph_module = capture(module, inputs)
    torch.manual_seed(7)
    others = [torch.randn_like(i) * 3 if i.is_floating_point() else i.flip(-1) for i in inputs]
    with torch.no_grad():
        expected, found = module(*others), graph_module(*others)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return graph_module


def settled(norm: nn.Module) -> nn.Module:
    """A batch normalization with statistics unlike the initial zeros and ones."""
    generator = torch.Generator().manual_seed(3)
    for tensor, low, high in (
        (norm.running_mean, -1.0, 1.0),
        (norm.running_var, 0.3, 2.0),
        (norm.weight.data, -1.5, 1.5),
        (norm.bias.data, -1.0, 1.0),
    ):
        tensor.uniform_(low, high, generator=generator)
    return norm


def test_batch_norm_is_folded_by_hand_computed_numbers() -> None:
    """weight * gamma / sqrt(var + eps) = 2 * 3 / 2 = 3; (1 - 5) * 3 / 2 + 0.5 = -5.5."""
    convolution, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0)
    with torch.no_grad():
        convolution.weight.fill_(2.0)
        convolution.bias.fill_(1.0)
        norm.weight.fill_(3.0)
        norm.bias.fill_(0.5)
        norm.running_mean.fill_(5.0)
        norm.running_var.fill_(4.0)
    graph_module = capture(nn.Sequential(convolution, norm).eval(), (torch.zeros(1, 1, 2, 2),))
    assert calls(graph_module) == [aten.conv2d.default]
    assert [v.item() for v in values(graph_module)] == [3.0, -5.5]


@pytest.mark.parametrize(
    ("layer", "norm", "shape", "target"),
    [
        (lambda: nn.Conv2d(4, 6, 3, bias=False), lambda: nn.BatchNorm2d(6), (1, 4, 5, 5), "conv2d.default"),
        (lambda: nn.Conv2d(4, 8, 3, groups=2), lambda: nn.BatchNorm2d(8), (1, 4, 5, 5), "conv2d.default"),
        (lambda: nn.Conv2d(4, 4, 3, groups=4), lambda: nn.BatchNorm2d(4), (1, 4, 5, 5), "conv2d.default"),
        (lambda: nn.Conv1d(4, 6, 3), lambda: nn.BatchNorm1d(6), (1, 4, 9), "conv1d.default"),
        (lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), (1, 4), "linear.default"),
        (
            lambda: nn.ConvTranspose2d(4, 6, 3),
            lambda: nn.BatchNorm2d(6),
            (1, 4, 5, 5),
            "conv_transpose2d.input",
        ),
        (
            lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False),
            lambda: nn.BatchNorm2d(6),
            (1, 4, 5, 5),
            "conv_transpose2d.input",
        ),
    ],
    ids=["conv", "grouped", "depthwise", "conv1d", "linear", "transposed", "transposed-grouped"],
)  # fmt: skip
def test_batch_norm_disappears_into_the_layer_before(
    layer: Callable[[], nn.Module], norm: Callable[[], nn.Module], shape: tuple[int, ...], target: str
) -> None:
    graph_module = captured(nn.Sequential(layer(), settled(norm())), torch.randn(shape))
    assert [str(t) for t in calls(graph_module)] == [f"aten.{target}"]


def test_batch_norm_without_a_layer_is_one_multiplication_and_one_addition() -> None:
    graph_module = captured(settled(nn.BatchNorm2d(3)), torch.randn(1, 3, 4, 4))
    assert calls(graph_module) == [aten.mul.Tensor, aten.add.Tensor]


def test_batch_norm_after_a_layer_that_others_read_is_not_folded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), settled(nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x + self.norm(x)

    graph_module = captured(Net(), torch.randn(1, 3, 4, 4))
    assert calls(graph_module).count(aten.mul.Tensor) == 1


@pytest.mark.parametrize("features", [4, 6])
def test_batch_norm_of_the_second_axis_is_not_folded_into_a_linear_layer_of_rows(features: int) -> None:
    """[1, 4, features]: the normalization's channels are the rows, the layer's are last."""
    module = nn.Sequential(nn.Linear(5, features), settled(nn.BatchNorm1d(4)))
    graph_module = captured(module, torch.randn(1, 4, 5))
    assert calls(graph_module) == [aten.linear.default, aten.mul.Tensor, aten.add.Tensor]


def test_a_weight_that_two_layers_share_is_scaled_for_each_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.first, self.second = settled(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.conv(self.first(self.conv(x))))

    assert calls(captured(Net(), torch.randn(1, 3, 4, 4))) == [aten.conv2d.default] * 2


def test_equal_padding_moves_into_the_convolution() -> None:
    module = nn.Sequential(nn.ZeroPad2d((2, 2, 1, 1)), nn.Conv2d(3, 4, 3, padding=1))
    graph_module = captured(module, torch.randn(1, 3, 6, 6))
    (convolution,) = graph_module.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    assert len(calls(graph_module)) == 1 and list(convolution.args[4]) == [2, 3]


@pytest.mark.parametrize(
    "padding",
    [nn.ZeroPad2d((0, 1, 0, 1)), nn.ConstantPad2d(1, 0.5), nn.ZeroPad2d((-1, -1, 1, 1))],
    ids=["uneven", "not zero", "negative"],
)
def test_other_padding_stays(padding: nn.Module) -> None:
    graph_module = captured(nn.Sequential(padding, nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 6, 6))
    assert calls(graph_module) == [aten.constant_pad_nd.default, aten.conv2d.default]


def test_padding_that_something_else_reads_stays() -> None:
    conv = nn.Conv2d(3, 3, 3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            x = F.pad(x, (1, 1, 1, 1))
            return self.conv(x) + x[:, :, 1:-1, 1:-1]

    assert aten.constant_pad_nd.default in calls(captured(Net(), torch.randn(1, 3, 6, 6)))


@pytest.mark.parametrize("kernel", [3, 4])
def test_padding_same_becomes_numbers(kernel: int) -> None:
    graph_module = captured(nn.Conv2d(3, 4, kernel, padding="same", dilation=(1, 2)), torch.randn(1, 3, 9, 9))
    assert calls(graph_module)[-1] is aten.conv2d.default


class First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


COMPOSITES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer_norm": (lambda: nn.LayerNorm(6), (1, 5, 6)),
    "layer_norm_two_axes": (lambda: nn.LayerNorm((5, 6)), (1, 5, 6)),
    "layer_norm_plain": (lambda: nn.LayerNorm(6, elementwise_affine=False), (1, 5, 6)),
    "rms_norm": (lambda: nn.RMSNorm(6), (1, 5, 6)),
    "group_norm": (lambda: nn.GroupNorm(3, 6), (1, 6, 4, 5)),
    "group_norm_rows": (lambda: nn.GroupNorm(2, 6, affine=False), (1, 6, 7)),
    "instance_norm": (lambda: nn.InstanceNorm2d(6, affine=True), (1, 6, 4, 5)),
    "instance_norm_running": (lambda: nn.InstanceNorm1d(6, track_running_stats=True), (1, 6, 7)),
    "silu": (nn.SiLU, (1, 5, 6)),
    "hardsigmoid": (nn.Hardsigmoid, (1, 5, 6)),
    "lstm": (lambda: First(nn.LSTM(6, 4, 2, batch_first=True)), (1, 5, 6)),
    "lstm_two_ways": (lambda: First(nn.LSTM(6, 4, bidirectional=True, batch_first=True)), (1, 5, 6)),
    "gru": (lambda: First(nn.GRU(6, 4, batch_first=True)), (1, 5, 6)),
    "attention": (lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), (1, 5, 6)),
    "causal_mask": (
        lambda: Function(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
        (1, 2, 5, 6),
    ),
    "boolean_mask": (
        lambda: Function(lambda x: F.scaled_dot_product_attention(x, x, x, torch.eye(5) == 1)),
        (1, 2, 5, 6),
    ),
    "added_mask": (
        lambda: Function(lambda x: F.scaled_dot_product_attention(x, x, x, torch.eye(5) * 3, scale=0.2)),
        (1, 2, 5, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_are_decomposed_into_primitives(name: str) -> None:
    build, shape = COMPOSITES[name]
    torch.manual_seed(0)
    found = {str(t) for t in calls(captured(build(), torch.randn(shape)))}
    assert not {
        t for t in found if "norm" in t or "lstm" in t or "gru" in t or "attention" in t or "silu" in t
    }


def test_numbers_in_arithmetic_become_constants() -> None:
    graph_module = captured(Function(lambda x: (2 * x + 3.0) / 4 - 1), torch.randn(1, 3))
    assert calls(graph_module) == [aten.mul.Tensor, aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor]
    assert [v.item() for v in values(graph_module)] == [2.0, 3.0, 0.25, 1.0]


def test_alpha_becomes_a_multiplication() -> None:
    graph_module = captured(Function(lambda x: torch.sub(x, x.exp(), alpha=0.5)), torch.randn(1, 3))
    assert calls(graph_module) == [aten.exp.default, aten.mul.Tensor, aten.sub.Tensor]


CLAMPS: dict[str, tuple[Callable[[Tensor], Tensor], list[object]]] = {
    "relu6": (F.relu6, [aten.relu6.default]),
    "clamp_0_6": (lambda x: x.clamp(0, 6), [aten.relu6.default]),
    "hardtanh_0_6": (lambda x: F.hardtanh(x, 0.0, 6.0), [aten.relu6.default]),
    "minimum_then_maximum": (lambda x: x.clamp(max=6).clamp(min=0), [aten.relu6.default]),
    "maximum_then_minimum": (lambda x: x.clamp(min=0).clamp(max=6), [aten.relu6.default]),
    "relu_then_clamp": (lambda x: torch.relu(x).clamp(max=6), [aten.relu6.default]),
    "clamp_min_0": (lambda x: x.clamp_min(0), [aten.relu.default]),
    "hardtanh": (F.hardtanh, [aten.clamp.default]),
    "inner_is_tighter": (lambda x: x.clamp(-1, 1).clamp(-6, 6), [aten.clamp.default]),
    "outer_is_tighter": (lambda x: x.clamp(-6, 6).clamp(-1, 1), [aten.clamp.default]),
    "disjoint": (lambda x: x.clamp(0, 1).clamp(2, 3), [aten.clamp.default]),
}


@pytest.mark.parametrize("name", CLAMPS)
def test_clamps_have_one_spelling(name: str) -> None:
    function, expected = CLAMPS[name]
    graph_module = captured(Function(function), torch.randn(1, 64))
    assert calls(graph_module) == expected


def test_a_clamp_that_others_read_is_left_alone() -> None:
    def function(x: Tensor) -> Tensor:
        inner = x.clamp(-1, 1)
        return inner + inner.clamp(-0.5, 6)

    assert calls(captured(Function(function), torch.randn(1, 64))).count(aten.clamp.default) == 2


def test_views_and_copies() -> None:
    def function(x: Tensor) -> Tensor:
        return x.unsqueeze(1).squeeze(1).flatten(1).view(1, 3, 4).contiguous().clone().detach()[:]

    found = calls(captured(Function(function), torch.randn(1, 3, 4)))
    assert set(found) <= {aten.reshape.default}


@pytest.mark.parametrize("exponent", [2, 0.5, -0.5])
def test_powers(exponent: float) -> None:
    graph_module = captured(Function(lambda x: (x * x + 1) ** exponent), torch.randn(1, 5))
    assert aten.pow.Tensor_Scalar not in calls(graph_module)


def test_what_depends_on_constants_only_is_folded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.sin(self.table[torch.arange(3)] * 2).reshape(1, 3, 4)

    graph_module = captured(Net(), torch.randn(1, 3, 4))
    assert calls(graph_module) == [aten.add.Tensor]


def test_dropout_is_gone_and_training_mode_of_the_original_stays() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9)).train()
    graph_module = capture(module, (torch.randn(1, 4),))
    assert calls(graph_module) == [aten.linear.default] and module.training


def test_the_module_is_not_changed() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4)), nn.ReLU()).eval()
    before = copy.deepcopy(module.state_dict())
    capture(module, (torch.randn(1, 3, 5, 5),))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.requires_grad for p in module.parameters())


def test_a_canonical_graph_is_copied_not_captured_again() -> None:
    first = capture(nn.Linear(3, 2).eval(), (torch.randn(1, 3),))
    second = capture(first, (torch.randn(1, 3),))
    assert second is not first
    assert [n.name for n in second.graph.nodes] == [n.name for n in first.graph.nodes]
    with torch.no_grad():
        second.get_parameter("weight").zero_()
    assert not torch.equal(first.get_parameter("weight"), second.get_parameter("weight"))


def test_every_node_carries_shape_and_module_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).mean((2, 3)))

    graph_module = captured(Net(), torch.randn(1, 3, 6, 6))
    modules = {n.name: n.meta["module"] for n in graph_module.graph.nodes if n.op == "call_function"}
    assert modules == {"conv2d": "body.0", "relu": "body.2", "mean": "", "linear": "head"}
    shapes = [tuple(n.meta["val"].shape) for n in graph_module.graph.nodes if n.op == "call_function"]
    assert shapes == [(1, 4, 4, 4), (1, 4, 4, 4), (1, 4), (1, 2)]


def test_nan_weights_are_refused_with_their_name() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with torch.no_grad():
        module[1].weight[0, 1] = float("nan")
    with pytest.raises(ModelError, match=r"'1\.weight' holds 1 values that are NaN or Inf of 4"):
        capture(module.eval(), (torch.randn(1, 3),))


def test_infinite_statistics_are_refused_with_their_name() -> None:
    norm = nn.BatchNorm2d(2)
    norm.running_var[1] = float("inf")
    with pytest.raises(ModelError, match="'running_var'"):
        capture(norm.eval(), (torch.randn(1, 2, 3, 3),))


def test_an_infinite_mask_among_the_buffers_is_allowed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.mask).softmax(-1)

    captured(Net(), torch.randn(1, 3, 3))


def test_data_dependent_control_flow_is_refused() -> None:
    module = Function(lambda x: x * 2 if x.sum() > 0 else x)
    with pytest.raises(ModelError, match=r"Function cannot be captured .*\(1, 3\).*control flow"):
        capture(module.eval(), (torch.randn(1, 3),))


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Linear cannot be captured .*\(1, 4\)"):
        capture(nn.Linear(3, 2).eval(), (torch.randn(1, 4),))


def test_fused_activations() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            y = self.b(x)
            y = torch.relu(y) + y  # read twice: not fused
            x = F.relu6(x + y)
            return torch.tanh(self.c(x.mean((2, 3))))  # tanh has a kernel of its own

    graph_module = captured(Net(), torch.randn(1, 3, 4, 4))
    assert fused_into(graph_module.graph) == {"conv2d": "relu", "add_1": "relu6"}


def test_mean_is_not_fused_with_its_relu() -> None:
    graph_module = captured(Function(lambda x: torch.relu(x.mean(1))), torch.randn(1, 3, 4))
    assert fused_into(graph_module.graph) == {}
