"""A causal decoder in Core ML: one token a call, keys and values as states of the program (iOS 18).

Takes `ids` [1, 1] and `position` [1] int32, gives `output` [1, 1, vocabulary]; states `key_N` and `value_N`
[1, kv heads, room, head] float16 keep their rows from call to call.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgecomp.errors import InputError
from edgecomp.exporters.coreml import CoreMLExporter
from edgecomp.language.cache import CacheScales, Storage
from edgecomp.language.cached import StatefulDecoder
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
) -> Artifact:
    """Write the .mlpackage; a prompt is read token by token, whatever `chunk` is.

    Raises InputError for a target without states, or a cache of few bits: Core ML's states are float16.
    """
    if target not in _TARGETS:
        raise InputError(
            f"target is {target!r}; a Core ML decoder is written as one of {', '.join(_TARGETS)}"
        )
    if storage != "float32" or scales is not None:
        raise InputError(
            f"cache is {storage!r}; Core ML's states are float16, which is what float32 stands for"
        )
    if target == "coreml-int4" and not weights.plan:
        raise InputError("coreml-int4 needs weights in groups: run quantize-weights first")
    module = StatefulDecoder(weights.decoder, room).eval()
    plan = QuantizationPlan({}, {_PREFIX + name: q for name, q in weights.plan.items()})
    inputs = (TensorSpec("ids", (1, 1), "int64"), TensorSpec("position", (1,), "int64"))
    made = replace(candidate, module=module, inputs=inputs, quantization=plan if weights.plan else None)
    return CoreMLExporter(target, states=module.states, importance="none").export(made, Data(), out)
