"""PyTorch operations, converted by coremltools, against PyTorch: at least 100 dB in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_programs import save_module, sqnr_db
from torch import Tensor, nn
from torch.nn import functional as F

from edgecomp.runtimes.coreml import CoreMLRuntime


class _Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def _image() -> Tensor:
    return torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(0))


def _positive() -> Tensor:
    return _image().abs() + 0.1


def _indices() -> Tensor:
    return torch.tensor([[0, 3, 1], [2, 2, 0]])


def _seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator) + 0.1
    return module


_x, _p = _image, _positive
ELEMENTWISE = {
    "abs": torch.abs,
    "acos": lambda x: torch.acos(x / 10),
    "asin": lambda x: torch.asin(x / 10),
    "atan": torch.atan,
    "atanh": lambda x: torch.atanh(x / 10),
    "ceil": torch.ceil,
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "floor_divide": lambda x: torch.floor_divide(x, 0.3),
    "log": lambda x: (x.abs() + 0.1).log(),
    "pow": lambda x: x.abs() ** 1.5,
    "remainder": lambda x: torch.remainder(x, 0.7),
    "round": torch.round,
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.1),
    "sign": torch.sign,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": lambda x: x.abs().sqrt(),
    "square": torch.square,
    "tan": lambda x: torch.tan(x / 4),
    "tanh": torch.tanh,
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "minimum": lambda x: torch.minimum(x, x.flip(0)),
    "where": lambda x: torch.where(x > 0.2, x, x * 2),
    "logic": lambda x: ((x > 0) & ~(x > 1) | (x < -1)).float(),
    "compare": lambda x: (x >= 0).float() + (x <= 0.5).float() + (x != 0).float() + (x == 0).float(),
    "casts": lambda x: (x * 3).int().float() + x.bool().float(),
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "relu6": lambda x: F.relu6(x * 4),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softmax": lambda x: F.softmax(x, 2),
    "softplus": F.softplus,
    "softsign": F.softsign,
    "prelu": nn.PReLU(4, 0.3),
    "mish": F.mish,
    "selu": F.selu,
    "threshold": lambda x: F.threshold(x, 0.3, 0.0),
}
REDUCTIONS = {
    "sum": lambda x: x.sum((1, 2)),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin((0, 3)),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=3),
    "norm 1": lambda x: torch.linalg.vector_norm(x, ord=1, dim=3),
    "logsumexp": lambda x: torch.logsumexp(x, 1),
    "var": lambda x: x.var(2),
    "argmax": lambda x: x.argmax(1),
    "argmin": lambda x: x.argmin(3),
    "topk": lambda x: torch.topk(x, 3, dim=2),
    "argsort": lambda x: x.argsort(3, descending=True),
    "sort": lambda x: torch.sort(x, dim=2).values,
    "cumsum": lambda x: x.cumsum(2),
}
SHAPES = {
    "reshape": lambda x: x.reshape(2, -1, 3),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "unsqueeze": lambda x: x[:, :1].squeeze(1).unsqueeze(-1),
    "tile": lambda x: x.repeat(1, 2, 1, 3),
    "expand": lambda x: x[:, :1].expand(2, 4, 7, 6),
    "flip": lambda x: x.flip((1, 3)),
    "roll": lambda x: x.roll(2, 3),
    "slice": lambda x: x[:, 1:, ::2, -3:],
    "select": lambda x: x[:, -1, 2],
    "split": lambda x: torch.cat([t * (i + 1) for i, t in enumerate(x.split([1, 3], 1))], 1),
    "chunk": lambda x: x.chunk(2, 3)[1],
    "stack": lambda x: torch.stack([x, x * 2], 2),
    "pad": lambda x: F.pad(x, (1, 2, 0, 3), value=0.5),
    "pad reflect": lambda x: F.pad(x, (2, 1, 3, 2), mode="reflect"),
    "pad replicate": lambda x: F.pad(x, (2, 1, 3, 2), mode="replicate"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[:, :, :6], 2),
    "tril": lambda x: x.tril(1),
    "triu": lambda x: x.triu(-1),
    "index_select": lambda x: x.index_select(2, torch.tensor([3, 0, 3])),
    "index": lambda x: x[:, [0, 2]],
    "full": lambda x: x + torch.full((6,), 0.5) + torch.arange(6) + torch.zeros_like(x),
    "one_hot": lambda x: F.one_hot(torch.tensor([1, 0, 3]), 4).float() @ x[0, :, :4, :],
    "scatter": lambda x: x.scatter(3, torch.zeros(2, 4, 7, 1, dtype=torch.long), 5.0),
    "assign": lambda x: torch.cat([x[:, :1] * 0 + 1, x[:, 1:]], 1),
    "meshgrid": lambda x: x + torch.meshgrid(torch.arange(7.0), torch.arange(6.0), indexing="ij")[0],
}
SPATIAL = {
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool without padding": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg_pool ceil": lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True),
    "avg_pool 1d": lambda x: F.avg_pool1d(x[:, :, 0], 2),
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool ceil": lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_max_pool": lambda x: F.adaptive_max_pool2d(x, 1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest to size": lambda x: F.interpolate(x, size=(9, 11)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear aligned": lambda x: F.interpolate(x, size=(9, 11), mode="bilinear", align_corners=True),
    "bilinear smaller": lambda x: F.interpolate(x, size=(4, 5), mode="bilinear", align_corners=False),
    "grid_sample": lambda x: F.grid_sample(
        x, F.affine_grid(torch.eye(2, 3).repeat(2, 1, 1) * 0.8, [2, 4, 5, 5], False), align_corners=False
    ),
    "batch_norm": _seeded(nn.BatchNorm2d(4)),
    "instance_norm": nn.InstanceNorm2d(4),
    "group_norm": _seeded(nn.GroupNorm(2, 4)),
    "layer_norm": _seeded(nn.LayerNorm([7, 6])),
    "local_response_norm": nn.LocalResponseNorm(3),
    "normalize": lambda x: F.normalize(x, dim=1),
    "rms_norm": lambda x: F.rms_norm(x, (6,), eps=1e-12),
    "linear": _seeded(nn.Linear(6, 5)),
    "matmul": lambda x: x @ x.transpose(2, 3),
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x[:, :2]),
    "bmm": lambda x: torch.bmm(x[0], x[1].transpose(1, 2)),
    "attention": lambda x: F.scaled_dot_product_attention(x, x * 2, x + 1),
    "causal attention": lambda x: F.scaled_dot_product_attention(x, x * 2, x + 1, is_causal=True),
}
CONVOLUTIONS = {
    "conv": nn.Conv2d(4, 8, 3),
    "conv same": nn.Conv2d(4, 8, 3, padding="same"),
    "conv padded": nn.Conv2d(4, 8, 3, stride=2, padding=(2, 1)),
    "conv dilated": nn.Conv2d(4, 8, 3, padding=2, dilation=2),
    "conv grouped": nn.Conv2d(4, 8, (3, 1), groups=2, bias=False),
    "conv depthwise": nn.Conv2d(4, 4, 3, groups=4),
    "conv reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "conv uneven": nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, 2)),
    "transposed": nn.ConvTranspose2d(4, 6, 3),
    "transposed strided": nn.ConvTranspose2d(4, 6, 3, 2, 1),
    "transposed output padding": nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1),
    "transposed grouped": nn.ConvTranspose2d(4, 6, 2, 2, groups=2),
    "transposed dilated": nn.ConvTranspose2d(4, 6, 3, dilation=2),
}
CASES = ELEMENTWISE | REDUCTIONS | SHAPES | SPATIAL | CONVOLUTIONS


def _agree(module: nn.Module, inputs: list[Tensor], path: Path) -> None:
    session = CoreMLRuntime().open(save_module(module, inputs, path))
    with torch.no_grad():
        expected = module(*inputs)
    expected = list(expected) if isinstance(expected, tuple | list) else [expected]
    found = session.run([t.numpy() for t in inputs])
    assert len(found) == len(expected)
    for theirs, ours in zip(expected, found, strict=True):
        assert ours.shape == tuple(theirs.shape)
        assert sqnr_db(theirs.numpy(), ours) >= 100


@pytest.mark.parametrize("name", list(CASES))
def test_operation(name: str, tmp_path: Path) -> None:
    function = CASES[name]
    module = function if isinstance(function, nn.Module) else _Call(function)
    _agree(module, [_image()], tmp_path / "m.mlpackage")


@pytest.mark.parametrize(
    ("name", "module", "inputs"),
    [
        ("conv 1d", nn.Conv1d(4, 8, 3, padding=1), [torch.randn(2, 4, 9)]),
        ("conv 3d", nn.Conv3d(4, 8, 3, padding=1), [torch.randn(1, 4, 5, 6, 7)]),
        ("transposed 1d", nn.ConvTranspose1d(4, 8, 3, 2), [torch.randn(2, 4, 9)]),
        ("max_pool 3d", nn.MaxPool3d(2), [torch.randn(1, 4, 6, 6, 4)]),
        ("embedding", nn.Embedding(4, 6), [_indices()]),
        ("gather", _Call(lambda x, i: x.gather(1, i)), [torch.randn(2, 5), _indices()]),
        ("take", _Call(lambda x, i: x[i]), [torch.randn(5, 3), _indices()]),
        ("integers", _Call(lambda i: (i * 3 - 2).float() / 2), [_indices()]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_other_inputs(name: str, module: nn.Module, inputs: list[Tensor], tmp_path: Path) -> None:
    _agree(module, inputs, tmp_path / "m.mlpackage")


def test_reciprocal_is_what_core_ml_computes(tmp_path: Path) -> None:
    """coremltools writes 1 / x as MIL's inverse, which is 1 / (x + 1e-4): the executor does not hide it."""
    x = _image().abs() + 1
    session = CoreMLRuntime().open(save_module(_Call(torch.reciprocal), [x], tmp_path / "m.mlpackage"))
    assert sqnr_db((1 / (x + 1e-4)).numpy(), session.run([x.numpy()])[0]) >= 120


def test_integers_come_back_as_int32(tmp_path: Path) -> None:
    path = save_module(_Call(lambda x: x.argmax(1)), [_image()], tmp_path / "m.mlpackage")
    session = CoreMLRuntime().open(path)
    assert session.outputs[0].dtype == "int32"
    assert session.run([_image().numpy()])[0].dtype == np.int32
