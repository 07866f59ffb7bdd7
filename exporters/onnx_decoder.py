"""A causal decoder in ONNX: prefill and decode in one graph, past and present keys and values at its door.

The names and shapes are those that ONNX Runtime GenAI and Optimum use: `input_ids` [1, T], `attention_mask`
[1, P + T], `past_key_values.N.key` and `.value` [1, kv heads, P, head], `logits` [1, T, vocabulary],
`present.N.key` and `.value`. Attention is ONNX Runtime's GroupQueryAttention, which rotates, appends to the
cache (in place where past and present are one buffer) and reads caches of 8 and 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgecomp import files, manifest
from edgecomp.errors import InputError, UnsupportedOpError
from edgecomp.exporters import onnx_int4
from edgecomp.exporters.onnx_graph import IR_VERSION, OPSET, Builder
from edgecomp.language.architecture import Architecture
from edgecomp.language.cache import Activations, CacheScales, Storage, check_scales
from edgecomp.language.decoder import Decoder, Norm
from edgecomp.language.weights import DecoderWeights
from edgecomp.spec import Artifact, Candidate, Data, Problem, TensorQuantization, TensorSpec

_CACHE_TYPES = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8, "int4": TensorProto.UINT8}
_HEAD_MULTIPLE = 16
"""Of rotated heads, as ONNX Runtime 1.31 says when it runs one that is not."""
_LEVELS = {"int8": 4, "float": 1}
_BITS = {"float32": 32, "int8": 8, "int4": 4}


def export(
    candidate: Candidate,
    weights: DecoderWeights,
    out: Path,
    *,
    target: str,
    room: int,
    chunk: int = 0,
    storage: Storage = "float32",
    scales: CacheScales | None = None,
    activations: Activations = "int8",
    accuracy_level: int | None = None,
) -> Artifact:
    """Write the .onnx file. `room`: tokens that the rotation tables cover. `target`: onnx-int4 or onnx-fp32.

    `chunk` is for formats of fixed shape; here any number of tokens can be run at once. `activations`: of
    4-bit weights, rounded to int8 in blocks or float; `accuracy_level`: ONNX Runtime's number for it, if set.

    Raises InputError when onnx-int4 has no plan of weights, or a cache of few bits has no scales;
    UnsupportedOpError for heads that ONNX Runtime's attention does not take.
    """
    width = weights.decoder.architecture.head_width
    if width % _HEAD_MULTIPLE:
        raise UnsupportedOpError(
            f"the decoder's heads are {width} wide, and ONNX Runtime's GroupQueryAttention takes multiples "
            f"of {_HEAD_MULTIPLE}; export it to TFLite or Core ML instead"
        )
    if target == "onnx-int4" and not weights.plan:
        raise InputError("onnx-int4 needs weights in groups: run quantize-weights first")
    check_scales(storage, scales)
    level = _LEVELS[activations] if accuracy_level is None else accuracy_level
    emitter = _Emitter(weights, room, storage, scales, level)
    model = emitter.model()
    a = weights.decoder.architecture
    draft = manifest.draft(
        candidate, Data(), path=out, target=target, inputs=_specs(a, storage, "input"),
        outputs=_specs(a, storage, "output"), skipped=_left_float(weights), made_with=("onnx", "onnxruntime"),
    )  # fmt: skip
    helper.set_model_props(model, {manifest.KEY: manifest.embedded(draft)})
    onnx.checker.check_model(model)
    with files.atomic(out) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        return manifest.describe(draft, temporary)


def _left_float(weights: DecoderWeights) -> list[Problem]:
    if not weights.plan:
        return []
    matrices = [n for n, p in weights.decoder.named_parameters() if p.dim() == 2 and n not in weights.plan]
    wider = [
        p for name, q in weights.plan.items() for p in onnx_int4.widened(q, name.removesuffix(".weight"))
    ]
    return wider + [
        Problem("MatMul", name.removesuffix(".weight"), "the plan has no integers for it")
        for name in matrices
    ]


def _specs(a: Architecture, storage: Storage, side: str) -> list[TensorSpec]:
    """What the manifest says; lengths that vary are 1."""
    dtype = {"float32": "float32", "int8": "int8", "int4": "uint8"}[storage]
    width = a.head_width // 2 if storage == "int4" else a.head_width
    stem = "past_key_values" if side == "input" else "present"
    cache = [
        TensorSpec(f"{stem}.{i}.{part}", (1, a.kv_heads, 1, width), dtype)
        for i in range(a.layers)
        for part in ("key", "value")
    ]
    if side == "output":
        return [TensorSpec("logits", (1, 1, a.vocabulary)), *cache]
    return [TensorSpec("input_ids", (1, 1), "int64"), TensorSpec("attention_mask", (1, 1), "int64"), *cache]


class _Emitter:
    """Writes the graph of one decoder."""

    def __init__(
        self,
        weights: DecoderWeights,
        room: int,
        storage: Storage,
        scales: CacheScales | None,
        accuracy_level: int,
    ) -> None:
        self.decoder: Decoder = weights.decoder
        self.a = weights.decoder.architecture
        self.plan: Mapping[str, TensorQuantization] = weights.plan
        self.state = {n: p.detach().numpy() for n, p in weights.decoder.state_dict().items()}
        self.room, self.storage, self.scales, self.level = room, storage, scales, accuracy_level
        self.b = Builder(OPSET)
        self.present: list[str] = []

    def model(self) -> onnx.ModelProto:
        b, a = self.b, self.a
        total = b.op("Gather", [b.op("Shape", ["attention_mask"]), b.constant([1], np.int64, "one")])
        counts = b.op("ReduceSum", ["attention_mask", b.constant([1], np.int64, "one")], keepdims=0)
        last = b.op("Cast", [b.op("Sub", [counts, "one"])], to=TensorProto.INT32)
        lengths = [last, b.op("Cast", [total], to=TensorProto.INT32)]
        x = self._embedded()
        for index in range(a.layers):
            x = self._layer(x, index, lengths)
        final = self._norm(x, "norm", self.decoder.norm)
        b.op("Identity", [self._linear(final, "head")], name="logits")
        return self._assembled()

    def _embedded(self) -> str:
        b, q = self.b, self.plan.get("embed.weight")
        name = self._shared("embed.weight")
        if q is not None:
            x = onnx_int4.gather(b, "input_ids", name, q)
        else:
            x = b.op("Gather", [b.constant(self.state["embed.weight"], np.float32, name), "input_ids"])
        if self.a.embedding_scale == 1.0:
            return x
        return b.op("Mul", [x, b.constant(self.a.embedding_scale, np.float32)])

    def _shared(self, name: str) -> str:
        """A tied head has the embedding's name: their bytes are stored once."""
        return "embed.weight" if self.a.tied and name == "head.weight" else name

    def _layer(self, x: str, index: int, lengths: Sequence[str]) -> str:
        b, stem, layer = self.b, f"layers.{index}", self.decoder.layer(index)
        seen = self._attention(self._norm(x, f"{stem}.before", layer.before), index, lengths)
        if self.a.sandwich:
            seen = self._norm(seen, f"{stem}.after_attention", layer.after_attention)
        x = b.op("Add", [x, seen])
        made = self._gated(self._norm(x, f"{stem}.between", layer.between), f"{stem}.gated")
        if self.a.sandwich:
            made = self._norm(made, f"{stem}.after_gated", layer.after_gated)
        return b.op("Add", [x, made])

    def _norm(self, x: str, name: str, norm: Norm) -> str:
        """In the form that ONNX Runtime fuses into one kernel."""
        b = self.b
        square = b.op("Pow", [x, b.constant(2.0, np.float32, "two")])
        mean = b.op("ReduceMean", [square], axes=[-1], keepdims=1)
        shifted = b.op("Add", [mean, b.constant(norm.epsilon, np.float32, f"epsilon_{norm.epsilon:g}")])
        divided = b.op("Div", [x, b.op("Sqrt", [shifted])])
        return b.op("Mul", [divided, b.constant(self.state[f"{name}.weight"], np.float32, f"{name}.weight")])

    def _linear(self, x: str, name: str) -> str:
        b, weight = self.b, f"{name}.weight"
        bias = self.state.get(f"{name}.bias")
        stored = "" if bias is None else b.constant(bias, np.float32, f"{name}.bias")
        if weight in self.plan:
            return onnx_int4.matmul(b, x, self._shared(weight), self.plan[weight], stored, self.level)
        if self._shared(weight) != weight:
            turned = b.op("Transpose", [self._shared(weight)], perm=[1, 0])
        else:
            turned = b.constant(self.state[weight].T, np.float32, f"{weight}_turned")
        product = b.op("MatMul", [x, turned])
        return b.op("Add", [product, stored]) if stored else product

    def _gated(self, x: str, name: str) -> str:
        b = self.b
        gate = self._linear(x, f"{name}.gate")
        if self.a.activation == "silu":
            active = b.op("Mul", [gate, b.op("Sigmoid", [gate])])
        else:
            active = b.op("FastGelu", [gate], domain=onnx_int4.DOMAIN)
        return self._linear(b.op("Mul", [active, self._linear(x, f"{name}.up")]), f"{name}.down")

    def _attention(self, x: str, index: int, lengths: Sequence[str]) -> str:
        b, a, stem = self.b, self.a, f"layers.{index}.attention"
        q, k, v = (self._linear(x, f"{stem}.{part}") for part in "qkv")
        if a.head_norm:
            attention = self.decoder.layer(index).attention
            q = self._head_norm(q, a.heads, f"{stem}.q_norm", attention.q_norm)
            k = self._head_norm(k, a.kv_heads, f"{stem}.k_norm", attention.k_norm)
        past = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        inputs = [q, k, v, *past, *lengths, *self._rotation(index)]
        options: dict[str, Any] = {
            "num_heads": a.heads, "kv_num_heads": a.kv_heads, "do_rotary": 1, "scale": a.attention_scale,
        }  # fmt: skip
        if a.window(index):
            options["local_window_size"] = a.window(index)
        if self.scales is not None:
            inputs += ["", "", "", *self._cache_scales(index, self.scales)]
            options |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
            options["kv_cache_bit_width"] = _BITS[self.storage]
        names = [f"seen.{index}", *(f"present.{index}.{part}" for part in ("key", "value"))]
        made = b.ops("GroupQueryAttention", inputs, 3, names, domain=onnx_int4.DOMAIN, **options)
        return self._linear(made[0], f"{stem}.o")

    def _cache_scales(self, index: int, scales: CacheScales) -> list[str]:
        both = {"key": scales.keys[index], "value": scales.values[index]}
        return [self.b.constant(v, np.float32, f"cache.{index}.{n}_scale") for n, v in both.items()]

    def _head_norm(self, x: str, heads: int, name: str, norm: Norm) -> str:
        b = self.b
        apart = b.op("Reshape", [x, b.constant([0, 0, heads, self.a.head_width], np.int64, f"split_{heads}")])
        return b.op("Reshape", [self._norm(apart, name, norm), b.constant([0, 0, -1], np.int64, "joined")])

    def _rotation(self, index: int) -> list[str]:
        """cos and sin [room, head / 2]; layers with the same frequencies share them."""
        inverse = getattr(self.decoder, f"rotation_{index}").numpy()
        same = next(
            i for i in range(index + 1)
            if np.array_equal(getattr(self.decoder, f"rotation_{i}").numpy(), inverse)
        )  # fmt: skip
        angles = np.arange(self.room, dtype=np.float32)[:, None] * inverse[None]
        tables = {"cos": np.cos(angles), "sin": np.sin(angles)}
        return [self.b.constant(t, np.float32, f"rotation.{same}.{n}") for n, t in tables.items()]

    def _assembled(self) -> onnx.ModelProto:
        a, kind = self.a, _CACHE_TYPES[self.storage]
        width = a.head_width // 2 if self.storage == "int4" else a.head_width
        info = helper.make_tensor_value_info
        inputs = [
            info("input_ids", TensorProto.INT64, [1, "count"]),
            info("attention_mask", TensorProto.INT64, [1, "total"]),
        ]
        outputs = [info("logits", TensorProto.FLOAT, [1, "count", a.vocabulary])]
        for index in range(a.layers):
            for part in ("key", "value"):
                shape: list[int | str] = [1, a.kv_heads, "past", width]
                inputs.append(info(f"past_key_values.{index}.{part}", kind, shape))
                outputs.append(info(f"present.{index}.{part}", kind, [1, a.kv_heads, "present", width]))
        graph = helper.make_graph(
            self.b.nodes, "edgecomp_decoder", inputs, outputs, list(self.b.initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(onnx_int4.DOMAIN, 1)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION[OPSET], producer_name="edgecomp"
        )
