"""A causal decoder in Core ML: functions `decode` (a token) and `prefill` (a chunk), weights shared (iOS 18).

A float16 cache is kept in states that both functions share: they take `ids` [1, T] and `position` [1] int32,
give `output` [1, T, vocabulary], and states `key_N` and `value_N` [1, kv heads, room, head] keep their rows.
States are float16 only (coremltools 9: "State only support fp16 dtype"), so a cache of int8 or int4 comes in
and its new rows go out as int8 arrays (iOS 26): after `ids` and `position` it takes `key_N` and `value_N`,
and gives after `output_0` (logits) the new rows in that order, which the caller writes at `position`.
With a chunk of 1 there is one function, `main`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from edgecomp.errors import InputError
from edgecomp.exporters.coreml import CoreMLExporter
from edgecomp.language.cache import Activations, CacheScales, Storage, check_scales
from edgecomp.language.cached import CachedDecoder, StatefulDecoder, example
from edgecomp.language.weights import DecoderWeights
from edgecomp.spec import Artifact, Candidate, Data, QuantizationPlan, TensorSpec

_TARGETS = ("coreml-int4", "coreml-fp16", "coreml-pal4", "coreml-pal6", "coreml-int8")
_PREFIX = "decoder."


def export(
    candidate: Candidate,
    weights: DecoderWeights,
    out: Path,
    *,
    target: str,
    room: int,
    chunk: int = 64,
    storage: Storage = "float32",
    scales: CacheScales | None = None,
    activations: Activations = "float",
) -> Artifact:
    """Write the .mlpackage. `storage` float32 stands for states of float16; int8 and int4 need iOS 26.

    `chunk`: tokens of a prompt that are read at once, the room at most. Activations are float16, whatever
    `activations` is.

    Raises InputError for a target without a decoder, or a cache of few bits without scales.
    """
    if target not in _TARGETS:
        raise InputError(
            f"target is {target!r}; a Core ML decoder is written as one of {', '.join(_TARGETS)}"
        )
    check_scales(storage, scales)
    if target == "coreml-int4" and not weights.plan:
        raise InputError("coreml-int4 needs weights in groups: run quantize-weights first")
    chunk = min(chunk, room)
    made = {
        name: _function(candidate, weights, count, room, storage, scales)
        for name, count in (("decode", 1), ("prefill", chunk))[: 1 if chunk == 1 else 2]
    }
    states = made["decode"].module.states if storage == "float32" else ()
    exporter = CoreMLExporter(
        target, states=states, importance="none", assignment="nearest",
        minimum_deployment_target="iOS18" if storage == "float32" else "iOS26",
    )  # fmt: skip
    return (
        exporter.export(made["decode"], Data(), out) if chunk == 1 else exporter.export_functions(made, out)
    )


def _function(
    candidate: Candidate,
    weights: DecoderWeights,
    count: int,
    room: int,
    storage: Storage,
    scales: CacheScales | None,
) -> Candidate:
    """The decoder for `count` tokens a call, with its plan under the names that it has there."""
    plan = QuantizationPlan({}, {_PREFIX + name: q for name, q in weights.plan.items()})
    inputs = [TensorSpec("ids", (1, count), "int64"), TensorSpec("position", (1,), "int64")]
    module: nn.Module
    if storage == "float32":
        module = StatefulDecoder(weights.decoder, room, count)
    else:
        module = CachedDecoder(weights.decoder, count, room, storage, scales)
        inputs += _cache_inputs(weights, room, storage)
    return replace(
        candidate, module=module.eval(), inputs=tuple(inputs), quantization=plan if weights.plan else None
    )


def _cache_inputs(weights: DecoderWeights, room: int, storage: Storage) -> list[TensorSpec]:
    arrays = example(weights.decoder.architecture, 1, room, storage)[2:]
    names = [f"{part}_{i}" for i in range(len(arrays) // 2) for part in ("key", "value")]
    return [TensorSpec(n, tuple(a.shape), "int8") for n, a in zip(names, arrays, strict=True)]
