"""A causal decoder in TFLite: signatures `prefill` (a chunk of tokens) and `decode` (one), weights shared.

Both take `ids` [1, T], `position` [1] and the cache of every layer, `key_N` and `value_N` [1, kv heads, room,
head] float32, and give `logits` [1, T, vocabulary] and the new rows `new_key_N`, `new_value_N` [1, kv, T,
head], which the caller writes into its cache at `position`: nothing of the cache is copied by the graph.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.fx import Node

from edgecomp import files, manifest
from edgecomp.errors import InputError, OutputError, UnsupportedOpError
from edgecomp.exporters import tflite  # noqa: F401  importing it fills the table of lowerings
from edgecomp.exporters.tflite_file import Draft, Signature, Tensor, serialize_all
from edgecomp.exporters.tflite_layout import identity
from edgecomp.exporters.tflite_lower import Lowering
from edgecomp.exporters.tflite_numerics import TARGETS
from edgecomp.graph import capture
from edgecomp.language.cache import CacheScales, Storage
from edgecomp.language.cached import CachedDecoder, example
from edgecomp.language.weights import DecoderWeights
from edgecomp.spec import Artifact, Candidate, Data, Problem, QuantizationPlan, TensorSpec

_PREFIX = "decoder."
"""Where the decoder's weights are in the cached module."""


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
) -> Artifact:
    """Write the .tflite file. `target`: tflite-int4 (with a plan of weights) or tflite-fp32.

    Raises InputError for another target or cache, UnsupportedOpError when an operation has no lowering.
    """
    if target not in ("tflite-int4", "tflite-fp32"):
        raise InputError(f"target is {target!r}; a TFLite decoder is written as tflite-int4 or tflite-fp32")
    if storage != "float32" or scales is not None:
        raise InputError(f"cache is {storage!r}; a TFLite decoder keeps its cache in float32")
    if target == "tflite-int4" and not weights.plan:
        raise InputError("tflite-int4 needs weights in groups: run quantize-weights first")
    made = {key: _lowered(weights, count, room, target) for key, count in (("prefill", chunk), ("decode", 1))}
    signatures = {key: signature for key, (signature, _) in made.items()}
    inputs, outputs = (
        [TensorSpec(n, t.shape, t.dtype) for n, t in side] for side in signatures["decode"][1:]
    )
    draft = manifest.draft(
        candidate, Data(), path=out, target=target, inputs=inputs, outputs=outputs,
        skipped=made["decode"][1], made_with=("flatbuffers", "ai-edge-litert"),
    )  # fmt: skip
    try:
        content = serialize_all(signatures, {manifest.KEY: manifest.embedded(draft).encode()})
    except OverflowError as error:
        raise OutputError(f"{out.name}: {error}") from error
    with files.atomic(out) as temporary:
        temporary.write_bytes(content)
        return manifest.describe(draft, temporary)


def _lowered(weights: DecoderWeights, count: int, room: int, target: str) -> tuple[Signature, list[Problem]]:
    module = CachedDecoder(weights.decoder, count, room)
    graph_module = capture(module, example(weights.decoder.architecture, count, room))
    plan = QuantizationPlan({}, {_PREFIX + name: q for name, q in weights.plan.items()})
    names = _names(weights.decoder.architecture.layers)
    nodes = graph_module.graph.find_nodes(op="placeholder")
    doors = [(name, identity(n.meta["val"].dim())) for name, n in zip(names[0], nodes, strict=True)]
    lowering = Lowering(graph_module, plan if weights.plan else None, TARGETS[target], doors)
    lowering.run()
    if lowering.problems:
        first = lowering.problems[0]
        raise UnsupportedOpError(
            f"target {target!r} cannot express {first.op} in {first.module}: {first.reason}"
        )
    results: list[Node] = []
    torch.fx.node.map_arg(graph_module.graph.find_nodes(op="output")[0].args, results.append)
    inputs = [(name, lowering.values[node].tensor) for name, node in zip(names[0], nodes, strict=True)]
    outputs = [(name, _at_the_door(lowering, node)) for name, node in zip(names[1], results, strict=True)]
    _named(lowering.draft, inputs, outputs)
    lowering.draft.clean([t for _, t in outputs])
    return (lowering.draft, inputs, outputs), lowering.notes


def _at_the_door(lowering: Lowering, node: Node) -> Tensor:
    value = lowering.input(node, node, as_stored=True)
    return lowering.relaid(node, value, identity(len(value.perm))).tensor


def _names(layers: int) -> tuple[list[str], list[str]]:
    cache = [f"{part}_{i}" for i in range(layers) for part in ("key", "value")]
    return ["ids", "position", *cache], ["logits", *(f"new_{name}" for name in cache)]


def _named(draft: Draft, inputs: list[tuple[str, Tensor]], outputs: list[tuple[str, Tensor]]) -> None:
    for name, tensor in outputs:
        tensor.name = draft.unique(name)
