"""What a weighted layer multiplies: its input unfolded to columns, its weight as matrices by group."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from edgecomp.graph.fold import convolution_arguments

aten = torch.ops.aten

_SUPPORTED = (aten.conv2d.default, aten.conv1d.default, aten.linear.default)

_MOST_COLUMNS = 4096
"""Columns kept of one sample; positions of a picture are alike, and the sums need no more."""


def supported(layer: Node) -> bool:
    """Convolutions and linear layers; a transposed convolution has no columns of its own."""
    return layer.target in _SUPPORTED


def groups_of(layer: Node) -> int:
    return 1 if layer.target is aten.linear.default else convolution_arguments(layer)[6]


def as_matrices(weight: np.ndarray, layer: Node) -> np.ndarray:
    """[out, in / groups, ...] -> [groups, out / groups, d]."""
    groups = groups_of(layer)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def columns(x: Tensor, layer: Node) -> Tensor:
    """One sample's input -> [groups, d, positions], at most a few thousand positions, evenly spaced."""
    if layer.target is aten.linear.default:
        flat = x.reshape(-1, x.shape[-1])
        return _thin(flat, 0).T[None]
    _, _, _, stride, padding, dilation, groups = convolution_arguments(layer)
    kernel = list(layer.args[1].meta["val"].shape[2:])
    if layer.target is aten.conv1d.default:
        x = x[:, :, None]
        kernel, stride, padding, dilation = [1, *kernel], [1, *stride], [0, *padding], [1, *dilation]
    if kernel == [1, 1] and padding == [0, 0] and groups == 1:
        flat = x[:, :, :: stride[0], :: stride[1]].transpose(0, 1).flatten(1)
        return _thin(flat, 1)[None]
    unfolded = _unfold(x, kernel, stride, padding, dilation)
    return unfolded.reshape(groups, -1, unfolded.shape[-1])


def _unfold(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """[1, C, H, W] -> [C * kernel, positions]; rows of a large picture are thinned before they are copied."""
    positions = (x.shape[2] // stride[0]) * (x.shape[3] // stride[1])
    if positions > _MOST_COLUMNS and x.shape[2] > 4 * kernel[0] * dilation[0]:
        x = _band(x, kernel, stride, dilation, _MOST_COLUMNS / positions)
        padding = [0, padding[1]]
    unfolded = torch.nn.functional.unfold(x, kernel, dilation, padding, stride)
    return _thin(unfolded.transpose(0, 1).flatten(1), 1)


def _band(x: Tensor, kernel: Any, stride: Any, dilation: Any, share: float) -> Tensor:
    """A middle band of rows: whole receptive fields, as many as `share` asks for."""
    rows = max(int(x.shape[2] * share) // stride[0] * stride[0], kernel[0] * dilation[0] * 2)
    top = (x.shape[2] - rows) // 2 // stride[0] * stride[0]
    return x[:, :, top : top + rows]


def _thin(values: Tensor, axis: int) -> Tensor:
    step = max(values.shape[axis] // _MOST_COLUMNS, 1)
    return values[::step] if axis == 0 else values[:, ::step]
