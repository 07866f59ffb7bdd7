"""A causal decoder in Core ML, one token a call.

A float16 cache is kept in states of the program (iOS 18): it takes `ids` [1, 1] and `position` [1] int32,
gives `output` [1, 1, vocabulary], and states `key_N` and `value_N` [1, kv heads, room, head] keep their rows.
States are float16 only (coremltools 9: "State only support fp16 dtype"), so a cache of int8 or int4 comes in
and its new rows go out as int8 arrays (iOS 26): after `ids` and `position` it takes `key_N` and `value_N`,
and gives after `output_0` (logits) the new rows in that order, which the caller writes at `position`.
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
    chunk: int = 1,
    storage: Storage = "float32",
    scales: CacheScales | None = None,
    activations: Activations = "float",
) -> Artifact:
    """Write the .mlpackage. `storage` float32 stands for states of float16; int8 and int4 need iOS 26.

    A prompt is read token by token, whatever `chunk` is; activations are float16, whatever `activations` is.

    Raises InputError for a target without a decoder, or a cache of few bits without scales.
    """
    if target not in _TARGETS:
        raise InputError(
            f"target is {target!r}; a Core ML decoder is written as one of {', '.join(_TARGETS)}"
        )
    check_scales(storage, scales)
    if target == "coreml-int4" and not weights.plan:
        raise InputError("coreml-int4 needs weights in groups: run quantize-weights first")
    plan = QuantizationPlan({}, {_PREFIX + name: q for name, q in weights.plan.items()})
    inputs = [TensorSpec("ids", (1, 1), "int64"), TensorSpec("position", (1,), "int64")]
    module: nn.Module
    if storage == "float32":
        stateful = StatefulDecoder(weights.decoder, room)
        module, states, deployment = stateful, stateful.states, "iOS18"
    else:
        module, states, deployment = CachedDecoder(weights.decoder, 1, room, storage, scales), (), "iOS26"
        inputs += _cache_inputs(weights, room, storage)
    made = replace(
        candidate, module=module.eval(), inputs=tuple(inputs), quantization=plan if weights.plan else None
    )
    exporter = CoreMLExporter(
        target, states=states, importance="none", assignment="nearest", minimum_deployment_target=deployment
    )
    return exporter.export(made, Data(), out)


def _cache_inputs(weights: DecoderWeights, room: int, storage: Storage) -> list[TensorSpec]:
    arrays = example(weights.decoder.architecture, 1, room, storage)[2:]
    names = [f"{part}_{i}" for i in range(len(arrays) // 2) for part in ("key", "value")]
    return [TensorSpec(n, tuple(a.shape), "int8") for n, a in zip(names, arrays, strict=True)]
