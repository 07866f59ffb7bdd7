"""A layer's input as the columns that its weight multiplies, for sums over calibration data."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from edgecomp.graph.fold import convolution_arguments

aten = torch.ops.aten

LAYERS = (aten.conv2d.default, aten.conv1d.default, aten.linear.default)
_POSITIONS = 1024
"""Positions of one sample that are kept, evenly spaced: neighbours are alike."""


def groups_of(layer: Node) -> int:
    """Groups of a convolution; 1 for a linear layer."""
    return 1 if layer.target is aten.linear.default else int(convolution_arguments(layer)[6])


def columns(layer: Node, value: Tensor) -> Tensor:
    """The input of a layer in `LAYERS` -> [groups, K, positions], where its weight is [out, K]."""
    if layer.target is aten.linear.default:
        flat = value.reshape(-1, value.shape[-1]).T
    else:
        _, _, _, stride, padding, dilation, _ = convolution_arguments(layer)
        kernel = tuple(layer.args[1].meta["val"].shape[2:])
        if layer.target is aten.conv1d.default:
            value, kernel = value[:, :, None], (1, *kernel)
            stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
        flat = torch.nn.functional.unfold(value, kernel, tuple(dilation), tuple(padding), tuple(stride))
        flat = flat.transpose(0, 1).flatten(1)
    flat = flat[:, :: max(flat.shape[1] // _POSITIONS, 1)]
    return flat.reshape(groups_of(layer), -1, flat.shape[1])
