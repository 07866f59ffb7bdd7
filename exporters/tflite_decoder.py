"""A causal decoder in TFLite: signatures `prefill` (a chunk of tokens) and `decode` (one), weights shared.

Both take `ids` [1, T], `position` [1] and the cache of every layer, `key_N` and `value_N` [1, kv heads, room,
head] float32 (or int8; two 4-bit integers a byte, [..., head / 2]), and give `logits` [1, T, vocabulary] and
the new rows `new_key_N`, `new_value_N` [1, kv heads, T, head], which the caller writes into its cache at
`position`: nothing of the cache is copied by the graph.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch.fx import Node

from edgecomp import files, manifest
from edgecomp.errors import InputError, OutputError, UnsupportedOpError
from edgecomp.exporters import tflite  # noqa: F401  importing it fills the table of lowerings
from edgecomp.exporters.tflite_file import Draft, Signature, Tensor, serialize_all
from edgecomp.exporters.tflite_layout import identity
from edgecomp.exporters.tflite_lower import Lowering
from edgecomp.exporters.tflite_numerics import TARGETS, Numerics
from edgecomp.graph import capture
from edgecomp.language.cache import Activations, CacheScales, Storage, check_scales
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
    activations: Activations = "int8",
) -> Artifact:
    """Write the .tflite file. `target`: tflite-int4 (with a plan of weights) or tflite-fp32.

    `activations` (tflite-int4): "int8", rounded at run time; "float": weights are restored to float32 when
    the file is loaded.

    Raises InputError for another target, or a cache of few bits without scales; UnsupportedOpError when an
    operation has no lowering.
    """
    if target not in ("tflite-int4", "tflite-fp32"):
        raise InputError(f"target is {target!r}; a TFLite decoder is written as tflite-int4 or tflite-fp32")
    check_scales(storage, scales)
    if target == "tflite-int4" and not weights.plan:
        raise InputError("tflite-int4 needs weights in groups: run quantize-weights first")
    numerics = replace(TARGETS[target], restored=target == "tflite-int4" and activations == "float")
    modules = {
        key: CachedDecoder(weights.decoder, count, room, storage, scales)
        for key, count in (("prefill", chunk), ("decode", 1))
    }
    made = {key: _lowered(module, weights, numerics, target) for key, module in modules.items()}
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


class _CacheLowering(Lowering):
    """Where int8 stays int8: other graphs compute with it, which TFLite does in 32 bits."""

    def dtype_of(self, node: Node) -> str:
        return "int8" if node.meta["val"].dtype is torch.int8 else super().dtype_of(node)


def _lowered(
    module: CachedDecoder, weights: DecoderWeights, numerics: Numerics, target: str
) -> tuple[Signature, list[Problem]]:
    given = example(weights.decoder.architecture, module.count, module.room, module.storage)
    graph_module = capture(module, given)
    plan = QuantizationPlan({}, {_PREFIX + name: q for name, q in weights.plan.items()})
    names = _names(weights.decoder.architecture.layers)
    nodes = graph_module.graph.find_nodes(op="placeholder")
    doors = [(name, identity(n.meta["val"].dim())) for name, n in zip(names[0], nodes, strict=True)]
    lowering = _CacheLowering(graph_module, plan if weights.plan else None, numerics, doors)
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
