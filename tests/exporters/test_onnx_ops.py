"""Every ONNX lowering against torch, in float, on ONNX Runtime with the graph as written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx_support import Function, candidate_of, export, normal
from torch import Tensor, nn

from edgecomp.errors import UnsupportedOpError
from edgecomp.exporters import onnx_ops
from edgecomp.exporters.onnx import OnnxExporter
from edgecomp.exporters.onnx_graph import Builder
from edgecomp.graph import capture
from edgecomp.runtimes.onnxruntime import OnnxRuntime

IMAGE = normal(1, 6, 8, 10, spread=3.0)
SQUARE = normal(1, 3, 7, 7, spread=3.0)
ROWS = normal(1, 5, 8, spread=2.0)
VECTOR = normal(1, 8, spread=2.0)
POSITIVE = ROWS.abs() + 0.1
INDICES = torch.tensor([[3, 0, 2]])
ROTATED = torch.tensor([2, 0, 1])
ON_AXIS = torch.tensor([[[1, 0, 3], [2, 2, 4]]])

_FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "relu": (torch.relu, (ROWS,)),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True), (ROWS,)),
    "vector_norm_1": (lambda x: torch.linalg.vector_norm(x, ord=1, dim=(0, 1)), (ROWS,)),
    "addcmul": (lambda x, y: torch.addcmul(x, x, y, value=0.5), (ROWS, ROWS + 1)),
    "relu6": (F.relu6, (ROWS * 3,)),
    "sigmoid": (torch.sigmoid, (ROWS,)),
    "tanh": (torch.tanh, (ROWS,)),
    "exp": (torch.exp, (ROWS,)),
    "log": (torch.log, (POSITIVE,)),
    "sqrt": (torch.sqrt, (POSITIVE,)),
    "rsqrt": (torch.rsqrt, (POSITIVE,)),
    "reciprocal": (torch.reciprocal, (POSITIVE,)),
    "abs": (torch.abs, (ROWS,)),
    "neg": (torch.neg, (ROWS,)),
    "sin": (torch.sin, (ROWS,)),
    "cos": (torch.cos, (ROWS,)),
    "tan": (torch.tan, (ROWS / 4,)),
    "atan": (torch.atan, (ROWS,)),
    "erf": (torch.erf, (ROWS,)),
    "floor": (torch.floor, (ROWS,)),
    "ceil": (torch.ceil, (ROWS,)),
    "round_half_to_even": (torch.round, (torch.tensor([[0.5, 1.5, 2.5, -0.5, 1.2]]),)),
    "sign": (torch.sign, (ROWS,)),
    "hardswish": (F.hardswish, (ROWS * 2,)),
    "hardsigmoid": (F.hardsigmoid, (ROWS * 2,)),
    "silu": (F.silu, (ROWS,)),
    "gelu": (F.gelu, (ROWS,)),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), (ROWS,)),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), (ROWS,)),
    "leaky_relu_default": (F.leaky_relu, (ROWS,)),
    "elu": (lambda x: F.elu(x, 0.7), (ROWS,)),
    "selu": (F.selu, (ROWS,)),
    "clamp_low": (lambda x: x.clamp(min=-0.5), (ROWS,)),
    "clamp_high": (lambda x: x.clamp(max=0.5), (ROWS,)),
    "clamp_both": (lambda x: x.clamp(-0.5, 1.5), (ROWS,)),
    "softmax": (lambda x: x.softmax(-1), (ROWS,)),
    "softmax_middle": (lambda x: x.softmax(1), (ROWS,)),
    "log_softmax": (lambda x: x.log_softmax(-1), (ROWS,)),
    "add": (lambda x, y: x + y, (ROWS, VECTOR)),
    "add_scalar": (lambda x: x + 1.5, (ROWS,)),
    "add_alpha": (lambda x, y: torch.add(x, y, alpha=0.3), (ROWS, VECTOR)),
    "sub": (lambda x, y: x - y, (ROWS, VECTOR)),
    "sub_from_scalar": (lambda x: 1 - x, (ROWS,)),
    "mul": (lambda x, y: x * y, (ROWS, VECTOR)),
    "div": (lambda x, y: x / y, (ROWS, POSITIVE)),
    "pow_square": (lambda x: x**2, (ROWS,)),
    "pow_three": (lambda x: x**3, (ROWS,)),
    "maximum": (torch.maximum, (ROWS, VECTOR)),
    "minimum": (torch.minimum, (ROWS, VECTOR)),
    "matmul": (lambda x, y: x @ y.transpose(1, 2), (ROWS, POSITIVE)),
    "bmm": (lambda x, y: torch.bmm(x, y.transpose(1, 2)), (ROWS, POSITIVE)),
    "compare_and_select": (lambda x, y: torch.where(x > y, x, y * 2), (ROWS, POSITIVE)),
    "not_equal": (lambda x: torch.where(x.round() != 1.0, x, x + 5), (ROWS,)),
    "logic": (lambda x: torch.where((x > -1) & ~(x >= 1) | (x <= -2), x, x * 0), (ROWS,)),
    "compare_tensors": (
        lambda x, y: torch.where((x < y) == (x <= y), x, y) + torch.where(x >= y, x, y).ne(x).float(),
        (ROWS.round(), VECTOR.round()),
    ),
    "compare_numbers": (
        lambda x: torch.where(torch.logical_and(x < 2, x == x.round()), x, x.eq(-1).float() * 9),
        (ROWS.round(),),
    ),
    "logical": (
        lambda x: torch.logical_or(torch.logical_not(x > 1), x > 2).float() * x,
        (ROWS,),
    ),
    "pow_tensor": (lambda x, y: x**y, (POSITIVE, VECTOR)),
    "mean": (lambda x: x.mean((2, 3)), (IMAGE,)),
    "mean_keep": (lambda x: x.mean(-1, keepdim=True), (IMAGE,)),
    "sum": (lambda x: x.sum(1), (IMAGE,)),
    "amax": (lambda x: x.amax((1, 2)), (IMAGE,)),
    "amin": (lambda x: x.amin(-1, keepdim=True), (IMAGE,)),
    "argmax": (lambda x: x.argmax(-1), (ROWS,)),
    "argmax_keep": (lambda x: x.argmax(1, keepdim=True), (ROWS,)),
    "argmax_of_everything": (lambda x: x.argmax(), (ROWS,)),
    "argmin": (lambda x: x.argmin(1), (ROWS,)),
    "cumsum": (lambda x: x.cumsum(1), (ROWS,)),
    "cast": (lambda x: (x > 0).float() + x.long().float(), (ROWS,)),
    "max_pool": (lambda x: F.max_pool2d(x, 3, 2, 1), (IMAGE,)),
    "max_pool_dilated": (lambda x: F.max_pool2d(x, 2, 1, 0, 2), (IMAGE,)),
    "max_pool_ceil": (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), (SQUARE,)),
    "avg_pool": (lambda x: F.avg_pool2d(x, 2), (IMAGE,)),
    "avg_pool_padded": (lambda x: F.avg_pool2d(x, 3, 2, 1), (SQUARE,)),
    "avg_pool_without_padding": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (SQUARE,)),
    "avg_pool_divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), (IMAGE,)),
    "adaptive_pool": (lambda x: F.adaptive_avg_pool2d(x, (4, 5)), (IMAGE,)),
    "adaptive_pool_one": (lambda x: F.adaptive_avg_pool2d(x, 1), (IMAGE,)),
    "reshape": (lambda x: x.reshape(1, 2, 3, 80), (IMAGE,)),
    "flatten": (lambda x: x.flatten(1), (IMAGE,)),
    "squeeze": (lambda x: x.unsqueeze(2).squeeze(2).unsqueeze(-1), (IMAGE,)),
    "permute": (lambda x: x.permute(0, 2, 3, 1), (IMAGE,)),
    "transpose_negative": (lambda x: x.transpose(-1, -2), (IMAGE,)),
    "slice": (lambda x: x[:, 1:5:2, 2:, :-3], (IMAGE,)),
    "slice_negative": (lambda x: x[:, -4:-1], (IMAGE,)),
    "select": (lambda x: x[:, 2] + x[:, -1], (IMAGE,)),
    "split": (lambda x: torch.cat(x.split([1, 2, 3], 1)[::-1], 1), (IMAGE,)),
    "chunk": (lambda x: x.chunk(2, -1)[1] * 2, (IMAGE,)),
    "cat": (lambda x, y: torch.cat([x, y, x], -1), (ROWS, POSITIVE)),
    "stack": (lambda x, y: torch.stack([x, y], 1), (ROWS, POSITIVE)),
    "expand": (lambda x: x[:, :1].expand(-1, 4, -1) * 1.5, (ROWS,)),
    "repeat": (lambda x: x.repeat(1, 2, 3), (ROWS,)),
    "repeat_more_dimensions": (lambda x: x.repeat(1, 2, 1, 3), (ROWS,)),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 3)), (IMAGE,)),
    "pad_value": (lambda x: F.pad(x, (1, 2), value=-1.5), (IMAGE,)),
    "pad_reflect": (lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), (IMAGE,)),
    "flip": (lambda x: x.flip(1, 3), (IMAGE,)),
    "roll": (lambda x: x.roll((1, -2), (2, 3)), (IMAGE,)),
    "index_one_axis": (lambda x: x[:, :, ROTATED], (IMAGE,)),
    "index_two_axes": (lambda x: x.permute(1, 2, 0, 3)[ROTATED, ROTATED], (IMAGE,)),
    "index_select": (lambda x: x.index_select(1, ROTATED), (IMAGE,)),
    "gather": (lambda x: x.gather(2, ON_AXIS), (ROWS[:, :2],)),
    "upsample_nearest": (lambda x: F.interpolate(x, scale_factor=2), (SQUARE,)),
    "upsample_nearest_to_size": (lambda x: F.interpolate(x, (10, 9)), (SQUARE,)),
    "upsample_nearest_uneven": (lambda x: F.interpolate(x, scale_factor=1.5), (SQUARE,)),
    "upsample_bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (SQUARE,)),
    "upsample_bilinear_uneven": (lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"), (SQUARE,)),
    "upsample_bilinear_corners": (
        lambda x: F.interpolate(x, (11, 12), mode="bilinear", align_corners=True),
        (SQUARE,),
    ),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (normal(1, 8, 3, 4),)),
    "causal_attention": (
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        (normal(1, 2, 5, 4),),
    ),
}

_MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv": (lambda: nn.Conv2d(6, 4, 3, 2, 1), IMAGE),
    "conv_without_bias": (lambda: nn.Conv2d(6, 4, (3, 1), bias=False), IMAGE),
    "conv_dilated": (lambda: nn.Conv2d(6, 4, 3, dilation=(2, 1), padding=(2, 1)), IMAGE),
    "conv_grouped": (lambda: nn.Conv2d(6, 12, 3, groups=3), IMAGE),
    "conv_depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), IMAGE),
    "conv_same_even_kernel": (lambda: nn.Conv2d(6, 4, 4, padding="same"), IMAGE),
    "conv_after_uneven_padding": (
        lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(6, 4, 3, 2)),
        IMAGE,
    ),
    "conv1d": (lambda: nn.Conv1d(5, 4, 3, 2, 1), ROWS),
    "conv1d_grouped": (lambda: nn.Conv1d(5, 10, 3, groups=5, dilation=2), ROWS),
    "conv_transpose": (lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), IMAGE),
    "conv_transpose_grouped": (lambda: nn.ConvTranspose2d(6, 4, 3, 2, groups=2), IMAGE),
    "linear": (lambda: nn.Linear(8, 3), VECTOR),
    "linear_without_bias": (lambda: nn.Linear(8, 3, bias=False), VECTOR),
    "linear_of_rows": (lambda: nn.Linear(8, 3), ROWS),
    "linear_of_rows_without_bias": (lambda: nn.Linear(8, 3, bias=False), ROWS),
    "linear_of_images": (lambda: nn.Linear(10, 3), IMAGE),
    "embedding": (lambda: nn.Embedding(4, 6), INDICES),
    "prelu": (lambda: nn.PReLU(6, 0.3), IMAGE),
    "prelu_shared_slope": (lambda: nn.PReLU(), IMAGE),
    "layer_norm": (lambda: nn.LayerNorm(8), ROWS),
    "group_norm": (lambda: nn.GroupNorm(3, 6), IMAGE),
    "batch_norm": (lambda: nn.BatchNorm2d(6), IMAGE),
    "lstm": (lambda: _First(nn.LSTM(8, 4, batch_first=True)), ROWS),
    "gru": (lambda: _First(nn.GRU(8, 4, batch_first=True)), ROWS),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), ROWS),
}


class _First(nn.Module):
    """The first output of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class _Together(nn.Module):
    """All cases in one module, one output each: one capture and one file for the whole table."""

    def __init__(self, cases: list[nn.Module], counts: list[int]) -> None:
        super().__init__()
        self.cases = nn.ModuleList(cases)
        self.counts = counts

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = iter(inputs)
        return tuple(
            m(*(next(given) for _ in range(n))) for m, n in zip(self.cases, self.counts, strict=True)
        )


@dataclass(frozen=True)
class Outcome:
    """What ONNX Runtime and torch gave for each case, and the operations that were lowered."""

    found: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    targets: set[object]
    model: onnx.ModelProto


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    torch.manual_seed(0)
    cases = {n: (Function(f), i) for n, (f, i) in _FUNCTIONS.items()}
    cases |= {n: (build(), (x,)) for n, (build, x) in _MODULES.items()}
    module = _Together([m for m, _ in cases.values()], [len(i) for _, i in cases.values()]).eval()
    inputs = [i for _, given in cases.values() for i in given]
    candidate = candidate_of(module, *inputs)
    artifact = export(candidate, tmp_path_factory.mktemp("onnx") / "all.onnx")
    results = OnnxRuntime().open(artifact.path, optimize=False).run([i.numpy() for i in inputs])
    with torch.no_grad():
        expected = [o.numpy() for o in module(*inputs)]
    graph = capture(module, inputs).graph
    return Outcome(
        dict(zip(cases, results, strict=True)),
        dict(zip(cases, expected, strict=True)),
        {n.target for n in graph.nodes if n.op == "call_function"},
        onnx.load(str(artifact.path)),
    )


@pytest.mark.parametrize("name", [*_FUNCTIONS, *_MODULES])
def test_lowering_equals_torch(outcome: Outcome, name: str) -> None:
    found, expected = outcome.found[name], outcome.expected[name]
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_file_is_valid_and_of_an_old_opset(outcome: Outcome) -> None:
    onnx.checker.check_model(outcome.model, full_check=True)
    assert [(o.domain, o.version) for o in outcome.model.opset_import] == [("", 17)]
    assert outcome.model.ir_version == 8


def test_every_lowering_of_a_canonical_graph_is_tried(outcome: Outcome) -> None:
    """All but the spellings that capture rewrites before an exporter sees them."""
    untried = {str(t) for t in set(onnx_ops.OPS) - outcome.targets}
    assert untried == _REWRITTEN_BEFORE


_REWRITTEN_BEFORE = {
    "aten.add.Scalar", "aten.sub.Scalar", "aten.mul.Scalar", "aten.div.Scalar", "aten.clamp_min.default",
    "aten.clamp_max.default", "aten.view.default", "aten.mm.default", "aten.addmm.default",
    "aten.full.default", "aten.full_like.default", "aten.scalar_tensor.default",
}  # fmt: skip


def test_an_unknown_operation_is_named_with_its_module(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Function(lambda x: torch.special.i0(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    candidate = candidate_of(Net(), VECTOR)
    (problem,) = OnnxExporter("onnx-fp32").problems(candidate)
    assert problem.op.startswith("aten.i0") and problem.module == "head"
    with pytest.raises(UnsupportedOpError, match=r"aten\.i0.* in head: no ONNX lowering"):
        export(candidate, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_index_tensors_in_the_middle_are_refused(tmp_path: Path) -> None:
    module = Function(lambda x: x[:, ROTATED, ROTATED])
    with pytest.raises(UnsupportedOpError, match=r"axes \[1, 2\]"):
        export(candidate_of(module, IMAGE), tmp_path / "model.onnx")


def test_builder_stores_a_named_constant_once() -> None:
    builder = Builder()
    assert builder.constant(1.0, np.float32, "one") == builder.constant(1.0, np.float32, "one")
    assert len(builder.initializers) == 1
