"""Attention whose heads can be removed: `nn.MultiheadAttention` computes with widths written down once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Heads(nn.Module):
    """What an `nn.MultiheadAttention` computes, with its parameters under their own names.

    `num_heads` * `head_dim` may be less than the width of the model, as some heads are gone. Inputs, masks
    and outputs are those of `nn.MultiheadAttention` (its documentation); nested tensors are not taken.
    """

    _qkv_same_embed_dim = False  # tells nn.TransformerEncoderLayer that its fused path is not for this

    def __init__(self, old: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = old.num_heads, old.head_dim
        self.embed_dim, self.batch_first, self.dropout = old.embed_dim, old.batch_first, old.dropout
        self.in_proj_weight, self.in_proj_bias = old.in_proj_weight, old.in_proj_bias
        self.out_proj = old.out_proj
        self.train(old.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = (query, key, value)
        alone = query.ndim == 2
        if alone:
            inputs = (query[None], key[None], value[None])
        elif not self.batch_first:
            inputs = (query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
        q, k, v = (self._heads(x, i) for i, x in enumerate(inputs))
        mask = self._mask(attn_mask, key_padding_mask if not alone else _row(key_padding_mask), q)
        weights = None
        if need_weights:
            weights = self._weights(q, k, mask)
            found = F.dropout(weights, self.dropout, self.training) @ v
        else:
            rate = self.dropout if self.training else 0.0
            found = F.scaled_dot_product_attention(q, k, v, mask, rate, is_causal and mask is None)
        outputs = self.out_proj(found.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if alone:
            return outputs[0], None if weights is None else weights[0]
        return outputs if self.batch_first else outputs.transpose(0, 1), weights

    def _heads(self, x: Tensor, part: int) -> Tensor:
        """[N, L, E] -> [N, heads, L, head_dim] of the queries (part 0), keys (1) or values (2)."""
        weight = self.in_proj_weight.unflatten(0, (3, self.num_heads * self.head_dim))[part]
        bias = self.in_proj_bias
        if bias is not None:
            bias = bias.unflatten(0, (3, self.num_heads * self.head_dim))[part]
        length = x.shape[1]
        return F.linear(x, weight, bias).view(len(x), length, self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """One mask to add to the scores, [1 or N, 1 or heads, L or 1, S]; None where there is none."""
        added = None
        if mask is not None:
            added = _added(mask, q)
            added = (
                added.view(len(q), self.num_heads, *mask.shape[1:]) if mask.ndim == 3 else added[None, None]
            )
        if padding is not None:
            hidden = _added(padding, q)[:, None, None]
            added = hidden if added is None else added + hidden
        return added

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        return (scores if mask is None else scores + mask).softmax(dim=-1)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A boolean mask (True: not seen) as numbers to add; others as they are."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _row(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[None]


def open_heads(module: nn.Module, names: Iterable[str] | None = None) -> None:
    """Put `Heads` in place of every `nn.MultiheadAttention` that can be said so, or of those named.

    In place; attention with other widths of keys and values, or with extra keys, stays as it is.
    """
    wanted = None if names is None else set(names)
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, nn.MultiheadAttention) or (wanted is not None and name not in wanted):
            continue
        plain = layer._qkv_same_embed_dim and layer.bias_k is None and not layer.add_zero_attn
        if name and plain:
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, Heads(layer))


def opened(module: nn.Module) -> list[str]:
    """Names of the modules that `open_heads` made."""
    return [n for n, m in module.named_modules() if isinstance(m, Heads)]
