"""A causal decoder in plain torch: teacher-forced for compression, with an explicit cache for generation.

`Decoder.forward(ids)` gives the logits of a whole text; `CachedDecoder.forward(ids, position, *cache)`
those of the next tokens after a cache. Both use the same layers: weights decided on the one fit the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgecomp.errors import ModelError
from edgecomp.language.architecture import Architecture, read

MASKED = -1e9
"""Score of a position that must not be seen; finite, so that no row of a softmax becomes NaN."""


_SMALLEST = 1e-3
"""Divisor of a row of zeros; its square is a number of float16."""

Pair = tuple[Tensor, Tensor]
Past = Pair | Callable[[Pair], Pair] | None
"""Keys and values before the new ones; or what stores the new ones and gives all; or nothing."""


class Norm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang and Sennrich, 2019).

    x is divided by its largest value first: some channels of language models pass 256, and squares of these
    are more than float16 holds, which is what Core ML computes in.
    """

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)
        y = x / largest
        mean = (y * y).mean(-1, keepdim=True)
        return y * torch.rsqrt(mean + self.epsilon / (largest * largest)) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.a = a
        self.q = nn.Linear(a.width, a.heads * a.head_width, bias=a.qkv_bias)
        self.k = nn.Linear(a.width, a.kv_heads * a.head_width, bias=a.qkv_bias)
        self.v = nn.Linear(a.width, a.kv_heads * a.head_width, bias=a.qkv_bias)
        self.o = nn.Linear(a.heads * a.head_width, a.width, bias=False)
        if a.head_norm:
            self.q_norm = Norm(a.head_width, a.epsilon)
            self.k_norm = Norm(a.head_width, a.epsilon)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Past
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [1, T, width], cos, sin [T, head], mask [T, S] -> result, new keys, values [1, kv, T, head]."""
        a, count = self.a, x.shape[1]
        q = self.q(x).reshape(1, count, a.heads, a.head_width)
        k = self.k(x).reshape(1, count, a.kv_heads, a.head_width)
        v = self.v(x).reshape(1, count, a.kv_heads, a.head_width).transpose(1, 2)
        if a.head_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotated(q.transpose(1, 2), cos, sin), rotated(k.transpose(1, 2), cos, sin)
        keys, values = k, v
        if callable(past):
            keys, values = past((k, v))
        elif past is not None:
            keys, values = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        shared = a.heads // a.kv_heads
        grouped = (q * a.attention_scale).reshape(1, a.kv_heads, shared * count, a.head_width)
        scores = grouped @ keys.transpose(2, 3)
        scores = scores.reshape(1, a.kv_heads * shared, count, -1) + mask
        seen = torch.softmax(scores, -1).reshape(1, a.kv_heads, shared * count, -1) @ values
        seen = seen.reshape(1, a.heads, count, a.head_width).transpose(1, 2)
        return self.o(seen.reshape(1, count, a.heads * a.head_width)), k, v


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Su et al., "RoFormer", 2021; the two halves of a head are the real and imaginary parts."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Gated(nn.Module):
    """down(activation(gate x) * up x)."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.gate = nn.Linear(a.width, a.hidden, bias=False)
        self.up = nn.Linear(a.width, a.hidden, bias=False)
        self.down = nn.Linear(a.hidden, a.width, bias=False)
        self.smooth = a.activation == "gelu_tanh"

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        active = nn.functional.gelu(gate, approximate="tanh") if self.smooth else nn.functional.silu(gate)
        return self.down(active * self.up(x))


class Layer(nn.Module):
    """Attention and a gated unit, each with a normalization before (and after, if `sandwich`)."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.before = Norm(a.width, a.epsilon)
        self.attention = Attention(a)
        self.between = Norm(a.width, a.epsilon)
        self.gated = Gated(a)
        self.sandwich = a.sandwich
        if a.sandwich:
            self.after_attention = Norm(a.width, a.epsilon)
            self.after_gated = Norm(a.width, a.epsilon)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Past = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        seen, k, v = self.attention(self.before(x), cos, sin, mask, past)
        x = x + (self.after_attention(seen) if self.sandwich else seen)
        made = self.gated(self.between(x))
        return x + (self.after_gated(made) if self.sandwich else made), k, v


class Decoder(nn.Module):
    """ids [1, T] int64 -> logits [1, T, vocabulary]. `rotations`: inverse frequencies of a layer."""

    def __init__(self, a: Architecture, rotations: list[Tensor]) -> None:
        super().__init__()
        self.architecture = a
        self.embed = nn.Embedding(a.vocabulary, a.width)
        self.layers = nn.ModuleList(Layer(a) for _ in range(a.layers))
        self.norm = Norm(a.width, a.epsilon)
        self.head = nn.Linear(a.width, a.vocabulary, bias=False)
        if a.tied:
            self.head.weight = self.embed.weight
        for index, inverse in enumerate(rotations):
            self.register_buffer(f"rotation_{index}", inverse.float(), persistent=False)

    def layer(self, index: int) -> Layer:
        """One layer, by its type."""
        found = self.layers[index]
        if not isinstance(found, Layer):
            raise TypeError(f"layer {index} is a {type(found).__name__}")
        return found

    def tables(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [positions, head] of a layer."""
        angles = positions.float()[:, None] * getattr(self, f"rotation_{layer}")[None]
        both = torch.cat([angles, angles], -1)
        return both.cos(), both.sin()

    def embedded(self, ids: Tensor) -> Tensor:
        scale = self.architecture.embedding_scale
        return self.embed(ids) if scale == 1.0 else self.embed(ids) * scale

    def forward(self, ids: Tensor) -> Tensor:
        count = ids.shape[1]
        positions = torch.arange(count)
        x = self.embedded(ids)
        for index, layer in enumerate(self.layers):
            cos, sin = self.tables(index, positions)
            x, _, _ = layer(x, cos, sin, causal(count, self.architecture.window(index)))
        return self.head(self.norm(x))


def causal(count: int, window: int) -> Tensor:
    """[T, T]: 0 where a token may look, MASKED elsewhere."""
    distance = torch.arange(count)[:, None] - torch.arange(count)[None]
    seen = (distance >= 0) & (distance < window) if window else distance >= 0
    return torch.where(seen, 0.0, MASKED)


def from_transformers(model: nn.Module) -> Decoder:
    """The Decoder with the weights of a transformers model (`LlamaForCausalLM` and its like).

    Raises ModelError naming an architecture that is not supported, or a weight that is missing.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} has no config; expected a causal model of transformers")
    a = read(config)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    made = Decoder(a, [_inverse(model, a, i, config) for i in range(a.layers)])
    wanted = {ours: theirs for ours, theirs in _names(a).items() if theirs in state}
    missing = sorted(set(made.state_dict()) - set(wanted) - ({"head.weight"} if a.tied else set()))
    if missing:
        raise ModelError(
            f"the {a.kind} model lacks the weight for {missing[0]!r}; is the checkpoint complete?"
        )
    made.load_state_dict(
        {ours: _value(state[theirs], ours, a) for ours, theirs in wanted.items()}, strict=False
    )
    return made.eval()


def _value(value: Tensor, name: str, a: Architecture) -> Tensor:
    """Gemma stores what its normalizations multiply by less one."""
    is_norm = value.dim() == 1 and not name.endswith("bias")
    return value.float() + 1.0 if is_norm and a.kind.startswith("gemma") else value.float()


def _names(a: Architecture) -> Mapping[str, str]:
    """Our name of a weight -> transformers'."""
    found = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not a.tied:
        found["head.weight"] = "lm_head.weight"
    between = "pre_feedforward_layernorm" if a.sandwich else "post_attention_layernorm"
    places = {
        "before": "input_layernorm", "between": between, "after_attention": "post_attention_layernorm",
        "after_gated": "post_feedforward_layernorm", "gated.gate": "mlp.gate_proj", "gated.up": "mlp.up_proj",
        "gated.down": "mlp.down_proj", "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
    }  # fmt: skip
    places |= {f"attention.{p}": f"self_attn.{p}_proj" for p in "qkvo"}
    for layer in range(a.layers):
        for ours, theirs in places.items():
            for kind in ("weight", "bias"):
                found[f"layers.{layer}.{ours}.{kind}"] = f"model.layers.{layer}.{theirs}.{kind}"
    if not a.sandwich:
        found = {k: v for k, v in found.items() if ".after_" not in k}
    return found


def _inverse(model: nn.Module, a: Architecture, layer: int, config: Any) -> Tensor:
    """Inverse frequencies of a layer's rotation, as the model computed them (scaled contexts included)."""
    buffers = dict(model.named_buffers())
    kinds = getattr(config, "layer_types", None) or [""] * a.layers
    for name in (f"model.rotary_emb.{kinds[layer]}_inv_freq", "model.rotary_emb.inv_freq"):
        if name in buffers:
            return buffers[name].detach().float().cpu()
    raise ModelError(f"the {a.kind} model has no model.rotary_emb.inv_freq; expected rotary positions")
