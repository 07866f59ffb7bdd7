"""Small functions of tensors, by family: what the lowerings are tested on, in float and in integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)

PICTURE = torch.randn(1, 4, 8, 8)
POSITIVE = torch.rand(1, 4, 8, 8) + 0.1
SEQUENCE = torch.randn(1, 5, 6)
IDS = torch.tensor([[1, 4, 2]])

_CHANNELS = torch.randn(1, 4, 1, 1)
_VECTOR = torch.randn(8)


class After(nn.Module):
    """A module, then a function of its result and of its input."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self.module(inputs[0]), *inputs)


class SqueezeExcite(nn.Module):
    """A gate from linear layers: [N, C] becomes [N, C, 1, 1] and multiplies the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.down, self.up = nn.Linear(6, 2), nn.Linear(2, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3))))))
        return y * gate.view(1, 6, 1, 1)


def _conv(*sizes: int, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(*sizes, **settings)


CONVOLUTIONS: dict[str, Callable[..., Any]] = {
    "same": _conv(4, 6, 3, padding=1),
    "stride": _conv(4, 6, 3, stride=2, padding=1),
    "uneven padding": _conv(4, 6, 3, stride=2, padding=(0, 1)),
    "dilation": _conv(4, 6, 3, dilation=2, padding=2),
    "groups": _conv(4, 6, 3, groups=2),
    "depthwise": _conv(4, 4, 3, padding=1, groups=4),
    "depthwise, two a channel": _conv(4, 8, 3, stride=2, padding=1, groups=4),
    "depthwise, dilation": _conv(4, 4, 3, padding=2, dilation=2, groups=4),
    "no bias": _conv(4, 6, 1, bias=False),
    "even kernel, same": _conv(4, 6, 4, padding="same"),
    "relu": nn.Sequential(_conv(4, 6, 3), nn.ReLU()),
    "relu6": nn.Sequential(_conv(4, 6, 3), nn.ReLU6()),
    "zero padding before": nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), _conv(4, 6, 3, stride=2)),
    "transposed": nn.ConvTranspose2d(4, 6, 2, 2),
    "transposed, cropped": nn.ConvTranspose2d(4, 6, 3, 2, 1, 1),
    "transposed, as SAME": nn.ConvTranspose2d(4, 6, 4, 2, 1),
    "transposed, groups": nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2),
    "transposed, dilation": nn.ConvTranspose2d(4, 6, 3, 1, 1, dilation=2),
}
NETWORKS: dict[str, Callable[..., Any]] = {
    "flatten, linear": nn.Sequential(_conv(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)),
    "flatten, relu, linear": nn.Sequential(_conv(4, 6, 3), nn.Flatten(), nn.ReLU(), nn.Linear(216, 5)),
    "mean, linear": nn.Sequential(
        _conv(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.ReLU()
    ),
    "squeeze and excite": SqueezeExcite(),
    "residual": After(_conv(4, 4, 3, padding=1), lambda y, x: F.relu(y + x)),
    "concatenation": After(_conv(4, 4, 3, padding=1), lambda y, x: torch.cat([y, x, torch.sigmoid(x)], 1)),
    "split": After(
        _conv(4, 4, 3, padding=1), lambda y, x: torch.cat([y.chunk(2, 1)[0], x.chunk(2, 1)[1]], 1)
    ),
    "batch norm alone": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
    "pixel shuffle after conv": nn.Sequential(_conv(4, 12, 3, padding=1), nn.ReLU(), nn.PixelShuffle(2)),
    "pixel shuffle after add": After(_conv(4, 12, 3), lambda y, x: F.pixel_shuffle(y + 1, 2)),
    "convnext": After(
        nn.Sequential(_conv(4, 4, 3, padding=1, groups=4)),
        lambda y, x: x + F.gelu(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    ),
    "patches": nn.Sequential(_conv(4, 6, 2, stride=2), nn.Flatten(2), nn.ReLU()),
}
POOLS: dict[str, Callable[..., Any]] = {
    "max": lambda x: F.max_pool2d(x, 2),
    "max, padded": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max, ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "mean": lambda x: F.avg_pool2d(x, 2),
    "mean, zeros count": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "mean, zeros do not count": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "adaptive mean": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear, corners": lambda x: F.interpolate(x, size=(13, 11), mode="bilinear", align_corners=True),
    "bilinear, any size": lambda x: F.interpolate(x, size=(13, 11), mode="bilinear"),
    "shuffle": lambda x: F.pixel_shuffle(x, 2),
    "unshuffle": lambda x: F.pixel_unshuffle(x, 2),
}
ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "relu": F.relu,
    "relu6": lambda x: F.relu6(x * 4),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "prelu": nn.PReLU(4),
    "prelu, one slope": nn.PReLU(),
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "abs": torch.abs,
    "neg": torch.neg,
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp below": lambda x: x.clamp(min=-0.5),
    "hardtanh": F.hardtanh,
    "softmax, channels": lambda x: x.softmax(1),
    "softmax, columns": lambda x: x.softmax(-1),
    "softmax, rows": lambda x: x.softmax(2),
    "log softmax": lambda x: x.log_softmax(1),
    "square": lambda x: x**2,
}
POSITIVE_ONLY: dict[str, Callable[..., Any]] = {
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "quotient": lambda x: x / (x + 1),
}
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "number added": lambda x: x + 1.5,
    "from a number": lambda x: 2 - x,
    "times a number": lambda x: x * 0.3,
    "divided by a number": lambda x: x / 3,
    "channels added": lambda x: x + _CHANNELS,
    "times channels": lambda x: x * _CHANNELS,
    "row added": lambda x: x + _VECTOR,
    "doubled": lambda x: x + x,
    "maximum": lambda x: torch.maximum(x, -x),
    "minimum": lambda x: torch.minimum(x, torch.tensor(0.3)),
    "where": lambda x: torch.where(x > 0.05, x, x * 2),
}
REDUCTIONS: dict[str, Callable[..., Any]] = {
    "sum": lambda x: x.sum(1),
    "sum of all": lambda x: x.sum(),
    "mean of channels": lambda x: x.mean(1, keepdim=True),
    "mean of rows": lambda x: x.mean(2),
    "largest": lambda x: x.amax(1),
    "smallest": lambda x: x.amin((2, 3)),
    "largest, by position": lambda x: x.max(1)[0],
    "where largest": lambda x: x.argmax(1),
    "where largest, kept": lambda x: x.argmax(2, keepdim=True),
    "where largest of all": lambda x: x.argmax(),
}
MOVES: dict[str, Callable[..., Any]] = {
    "slice": lambda x: x[:, 1:3],
    "strided slice": lambda x: x[:, :, ::2, 1::3],
    "select": lambda x: x[:, 2],
    "last row": lambda x: x[:, :, -1],
    "stack": lambda x: torch.stack([x, x], 1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "permute otherwise": lambda x: x.permute(0, 3, 1, 2),
    "reshape": lambda x: x.reshape(1, 16, 16),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "pad": lambda x: F.pad(x, (1, 2, 3, 0)),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "pad with a number": lambda x: F.pad(x, (1, 1), value=0.5),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "flip": lambda x: x.flip(2),
    "roll": lambda x: x.roll((1, -2), (2, 3)),
    "index": lambda x: x[:, [2, 0, 3]],
    "two indices": lambda x: x[:, :, [0, 1], [2, 3]],
    "index select": lambda x: x.index_select(3, torch.tensor([1, 5])),
    "channel shuffle": lambda x: x.view(1, 2, 2, 8, 8).transpose(1, 2).reshape(1, 4, 8, 8),
}
# Without integer kernels in every target: float only, or left float by the plan.
FLOAT_ONLY: dict[str, Callable[..., Any]] = {
    "sin": torch.sin,
    "cos": torch.cos,
    "cube": lambda x: x**3,
    "log1p": lambda x: x.abs().log1p(),
    "expm1": torch.expm1,
    "reciprocal": lambda x: 1 / (x.abs() + 0.5),
    "power": lambda x: x.abs() ** x.abs(),
    "floor": lambda x: (x * 3).floor(),
    "round": lambda x: (x * 3).round(),
    "sign": torch.sign,
    "variance": lambda x: x.var((2, 3)),
    "norm": lambda x: x.norm(dim=1),
    "normalized": lambda x: F.normalize(x, dim=1),
    "product": lambda x: x.prod(1),
    "cumulative sum": lambda x: x.cumsum(1),
    "cumulative sum of rows": lambda x: x.cumsum(3),
    "group norm": nn.GroupNorm(2, 4),
    "largest two": lambda x: x.topk(2)[0],
    "greater": lambda x: x > 0.2,
    "logic": lambda x: ((x > 0) & (x < 1)) | ~(x > -1),
    "any": lambda x: (x > 2).any(1),
    "count": lambda x: (x > 0).sum(1),
    "cast": lambda x: (x > 0).float(),
    "to integers": lambda x: (x * 3).int(),
    "masked": lambda x: x.masked_fill(x > 0, -1.0),
    "triangle": lambda x: x.triu(),
}
SEQUENCES: dict[str, Callable[..., Any]] = {
    "linear": nn.Linear(6, 4),
    "linear, no bias": nn.Linear(6, 4, bias=False),
    "linear, relu": nn.Sequential(nn.Linear(6, 4), nn.ReLU()),
    "conv1d": nn.Sequential(nn.Conv1d(5, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 3, 2, groups=8)),
    "product": lambda x: x @ x.transpose(1, 2),
    "product with a constant": lambda x: x @ _MATRIX,
    "product with a vector": lambda x: x @ _MATRIX[:, 0],
    "constant first": lambda x: _LEFT @ x,
    "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "repeat": lambda x: x.repeat(2, 1, 3),
    "gather": lambda x: x.gather(1, torch.tensor([[[0, 1, 2, 3, 4, 0], [1, 1, 1, 1, 1, 1]]])),
}
_MATRIX = torch.randn(6, 3)
_LEFT = torch.randn(2, 5)
