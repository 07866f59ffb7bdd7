"""Decompositions of composite operations into the vocabulary of canonical graphs.

Each is the operation's definition in primitive ops; the source is PyTorch's documentation of the op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import default_decompositions

aten = torch.ops.aten

# Composite for PyTorch, primitive for us: every target has them.
_KEEP = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv1d.padding,
    aten.conv_transpose2d.input,
    aten.linear.default,
    aten.matmul.default,
    aten.batch_norm.default,
    aten.hardswish.default,
    aten.gelu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.leaky_relu.default,
    aten.prelu.default,
    aten.elu.default,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.pixel_shuffle.default,
    aten.embedding.default,
    aten.roll.default,
)


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = list(range(x.dim() - len(shape), x.dim()))
    return _affine(_normalize(x, dims, eps), weight, bias)


def _normalize(x: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    variance = (centred * centred).mean(dims, keepdim=True)
    return centred * torch.rsqrt(variance + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def _group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    grouped = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    normal = _normalize(grouped, list(range(2, grouped.dim())), eps).reshape(x.shape)
    channels = [1, x.shape[1]] + [1] * (x.dim() - 2)
    return _affine(
        normal,
        None if weight is None else weight.reshape(channels),
        None if bias is None else bias.reshape(channels),
    )


def _instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    channels = [1, x.shape[1]] + [1] * (x.dim() - 2)
    if use_input_stats or running_mean is None or running_var is None:
        normal = _normalize(x, list(range(2, x.dim())), eps)
    else:
        factor = torch.rsqrt(running_var + eps).reshape(channels)
        normal = (x - running_mean.reshape(channels)) * factor
    return _affine(
        normal,
        None if weight is None else weight.reshape(channels),
        None if bias is None else bias.reshape(channels),
    )


def _rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = list(range(x.dim() - len(shape), x.dim()))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps), weight, None)


def _hardsigmoid(x: Tensor) -> Tensor:
    return torch.nn.functional.relu6(x + 3.0) * (1.0 / 6.0)


def _addcmul(x: Tensor, first: Tensor, second: Tensor, *, value: float = 1) -> Tensor:
    product = first * second
    return x + (product if value == 1 else product * value)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        attn_mask = allowed if attn_mask is None else attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, -1) @ value


def table() -> dict[Any, Callable[..., Any]]:
    """The decomposition table of `edgecomp.graph.capture`."""
    decompositions = default_decompositions()
    for op in _KEEP:
        decompositions.pop(op, None)
    decompositions[aten.layer_norm.default] = _layer_norm
    decompositions[aten.group_norm.default] = _group_norm
    decompositions[aten.instance_norm.default] = _instance_norm
    decompositions[aten.rms_norm.default] = _rms_norm
    decompositions[aten.hardsigmoid.default] = _hardsigmoid
    decompositions[aten.addcmul.default] = _addcmul
    decompositions[aten.scaled_dot_product_attention.default] = _attention
    return decompositions
