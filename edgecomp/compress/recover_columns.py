"""Convolutions and linear layers as matrix products: what recovery after pruning fits.

For each layer here, `flat(layer, layer(x))` is `columns(layer, x) @ matrix(layer).T` and the bias, where a
grouped layer's columns are those of its first group, then of its second, and each output sums over its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from edgecomp.compress.prune_groups import Place

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)


def fits(layer: nn.Module) -> bool:
    """Is this a layer that the functions here know? Transposed ones in groups are not."""
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        return layer.groups == 1
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)


def groups(layer: Any) -> int:
    return 1 if isinstance(layer, nn.Linear) else int(layer.groups)


def kept_outputs(layer: nn.Module, name: str, kept: Mapping[Place, np.ndarray]) -> np.ndarray | None:
    """The original's outputs that stay; None: all of them."""
    return kept.get((f"{name}.weight", 1 if isinstance(layer, _TRANSPOSED) else 0))


def matrix(layer: Any) -> Tensor:
    """[outputs, columns of one group]."""
    weight = layer.weight.detach()
    return (_turned(weight) if isinstance(layer, _TRANSPOSED) else weight).flatten(1)


def put(layer: Any, fitted: Tensor) -> None:
    """Give the layer this matrix as its weight."""
    weight = layer.weight
    if isinstance(layer, _TRANSPOSED):
        fitted = _turned(fitted.view(weight.shape[1], weight.shape[0], *weight.shape[2:]))
    weight.copy_(fitted.view(weight.shape) if fitted.ndim == 2 else fitted)


def _turned(weight: Tensor) -> Tensor:
    """[in, out, ...] -> [out, in, ...] with the kernel turned around, and back."""
    return weight.transpose(0, 1).flip(list(range(2, weight.ndim)))


def columns(layer: Any, x: Tensor) -> Tensor:
    """[rows, groups * columns]: what one output of the layer is a weighted sum of."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    stride = tuple(layer.stride)
    if isinstance(layer, _TRANSPOSED):
        x, stride = _spread(layer, x), (1,) * len(stride)
    else:
        x = _padded(layer, x)
    kernel, dilation = tuple(layer.kernel_size), tuple(layer.dilation)
    if x.ndim == 3:
        x, kernel, dilation, stride = x[:, :, None], (1, *kernel), (1, *dilation), (1, *stride)
    return F.unfold(x, kernel, dilation, 0, stride).transpose(1, 2).flatten(0, 1)


def flat(layer: nn.Module, y: Tensor) -> Tensor:
    """[rows, outputs] in the order of `columns`."""
    if isinstance(layer, nn.Linear):
        return y.reshape(-1, y.shape[-1])
    return y.flatten(2).transpose(1, 2).flatten(0, 1)


def _padded(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """`_reversed_padding_repeated_twice` is how PyTorch's own convolutions hold their padding, "same" too."""
    amounts: list[int] = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, amounts, mode=mode)


def _spread(layer: Any, x: Tensor) -> Tensor:
    """The input of the plain convolution that a transposed one is: zeros between values and around them."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], layer.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    every: Any = (..., *(slice(None, None, s) for s in layer.stride))
    wide[every] = x
    amounts: list[int] = []
    facts = zip(layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True)
    for kernel, dilation, padding, extra in reversed(list(facts)):
        around = dilation * (kernel - 1) - padding
        amounts += [around, around + extra]
    return F.pad(wide, amounts)  # a padding below zero cuts
