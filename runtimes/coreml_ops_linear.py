"""MIL's matrix products and attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgecomp.runtimes.coreml_args import Table


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., D_in], weight [D_out, D_in]."""
    return F.linear(x, weight, bias)


def matmul(
    x: Tensor, y: Tensor, transpose_x: Tensor | bool = False, transpose_y: Tensor | bool = False
) -> Tensor:
    x = x.transpose(-1, -2) if bool(transpose_x) and x.dim() > 1 else x
    y = y.transpose(-1, -2) if bool(transpose_y) and y.dim() > 1 else y
    return torch.matmul(x, y)


def einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(E) + mask) V; a boolean mask says which positions take part."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


OPS: Table = {
    "einsum": einsum,
    "linear": linear,
    "matmul": matmul,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
