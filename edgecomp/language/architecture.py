"""What a decoder is made of: one description for the Llama, Qwen and Gemma kinds, read from a model's config.

Source: the configuration classes of Hugging Face transformers (`LlamaConfig`, `MistralConfig`, `Qwen2Config`,
`Qwen3Config`, `GemmaConfig`, `Gemma3TextConfig`); only their attributes are read, the library is not needed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgecomp.errors import ModelError

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text")
_GEMMA = ("gemma", "gemma3_text")


@dataclass(frozen=True)
class Architecture:
    """Sizes and variants of a decoder. `windows`: for each layer the tokens that it looks back on (0: all).

    `head_norm`: queries and keys are normalized. `sandwich`: normalizations after attention and after the
    gated unit too. `embedding_scale`: what embeddings are multiplied by. `attention_scale`: what scores are.
    """

    kind: str
    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    context: int
    epsilon: float
    activation: Literal["silu", "gelu_tanh"] = "silu"
    tied: bool = True
    qkv_bias: bool = False
    head_norm: bool = False
    sandwich: bool = False
    embedding_scale: float = 1.0
    attention_scale: float = 1.0
    windows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ModelError(
                f"{self.heads} attention heads cannot share {self.kv_heads} key-value heads; the number of "
                "heads must be a multiple of it"
            )

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read(config: Any) -> Architecture:
    """The architecture that a config describes. Raises ModelError naming what is not supported."""
    kind = str(getattr(config, "model_type", type(config).__name__))
    if kind not in KINDS:
        raise ModelError(
            f"architecture {kind!r} is not supported as a decoder; supported are {', '.join(KINDS)}; "
            "a model of another kind can be exported as a plain module, without a cache"
        )
    _refuse_variants(config, kind)
    heads = int(config.num_attention_heads)
    head_width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    scale = getattr(config, "query_pre_attn_scalar", None)
    return Architecture(
        kind=kind,
        vocabulary=int(config.vocab_size),
        width=int(config.hidden_size),
        hidden=int(config.intermediate_size),
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_width=head_width,
        context=int(config.max_position_embeddings),
        epsilon=float(config.rms_norm_eps),
        activation="gelu_tanh" if kind in _GEMMA else "silu",
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or bool(getattr(config, "attention_bias", False)),
        head_norm=kind in ("qwen3", "gemma3_text"),
        sandwich=kind == "gemma3_text",
        embedding_scale=float(config.hidden_size) ** 0.5 if kind in _GEMMA else 1.0,
        attention_scale=float(scale or head_width) ** -0.5,
        windows=_windows(config),
    )


def _refuse_variants(config: Any, kind: str) -> None:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            raise ModelError(f"a {kind} model with {name} is not supported as a decoder")
    if getattr(config, "mlp_bias", False):
        raise ModelError(f"a {kind} model with mlp_bias is not supported as a decoder")
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation not in (None, "silu", "gelu", "gelu_pytorch_tanh"):
        raise ModelError(f"a {kind} model with activation {activation!r} is not supported as a decoder")


def _windows(config: Any) -> tuple[int, ...]:
    width = getattr(config, "sliding_window", None)
    if not width or getattr(config, "use_sliding_window", True) is False:
        return ()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * int(config.num_hidden_layers)
    return tuple(int(width) if kind == "sliding_attention" else 0 for kind in kinds)
