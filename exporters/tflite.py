"""TFLite targets: the canonical graph and the quantization plan, lowered by our own emitter.

The scales in the file are the plan's, the bytes depend on the candidate alone, and every tensor carries the
name of the torch module that it came from (see docs/decisions/tflite-lowering.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch.fx import GraphModule, Node

from edgecomp import files, manifest
from edgecomp.errors import InputError, ModelError, OutputError, UnknownNameError, UnsupportedOpError
from edgecomp.exporters import (
    tflite_activation,
    tflite_check,
    tflite_conv,
    tflite_index,
    tflite_linear,
    tflite_math,
    tflite_pool,
    tflite_reduce,
    tflite_shape,
)
from edgecomp.exporters.tflite_file import Tensor, serialize
from edgecomp.exporters.tflite_layout import Perm, channels_last, identity
from edgecomp.exporters.tflite_lower import Lowering, Value
from edgecomp.exporters.tflite_numerics import TARGETS
from edgecomp.graph import capture, fused_into
from edgecomp.spec import Artifact, Candidate, Data, Layout, Problem, TensorSpec

# Importing a family fills the table of lowerings.
_FAMILIES = (
    tflite_activation, tflite_conv, tflite_index, tflite_linear,
    tflite_math, tflite_pool, tflite_reduce, tflite_shape,
)  # fmt: skip

aten = torch.ops.aten

LAYOUT_KEY = "edgecomp_layout"
"""Name of the metadata buffer that says which tensors are not stored in torch's order."""

_SPATIAL = {
    aten.conv2d.default, aten.conv_transpose2d.input, aten.max_pool2d.default, aten.avg_pool2d.default,
    aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.pixel_shuffle.default,
}  # fmt: skip


@dataclass(frozen=True)
class TFLiteExporter:
    """Exports to one TFLite target.

    `layout`: order of pictures at the door, NHWC (TFLite's own; no transposes) or NCHW (PyTorch's).
    `output_names`: in order; `output`, or `output_0` and so on, by default.
    `group_size`: inputs of a linear layer that share a scale in `tflite-int4`; a multiple of 32.
    `activations` (`tflite-int4`): "int8", rounded at run time by LiteRT's kernels; "float": weights become
    float32 when the file is loaded, which takes the memory and the time of a float model.
    """

    target: str = "tflite-int8"
    layout: Literal["NHWC", "NCHW"] = "NHWC"
    output_names: tuple[str, ...] = ()
    group_size: int = 32
    activations: Literal["int8", "float"] = "int8"

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UnknownNameError("target", self.target, TARGETS)
        if self.layout not in ("NHWC", "NCHW"):
            raise InputError(f"layout is {self.layout!r}; expected NHWC or NCHW")
        if self.group_size < 32 or self.group_size % 32:
            raise InputError(f"group_size is {self.group_size}; LiteRT takes multiples of 32")
        if self.activations not in ("int8", "float"):
            raise InputError(f"activations is {self.activations!r}; expected int8 or float")
        if self.activations == "float" and self.target != "tflite-int4":
            raise InputError(f"activations: float is a setting of tflite-int4, not of {self.target}")

    def problems(self, candidate: Candidate) -> list[Problem]:
        """Operations that the target cannot express, with the module each comes from."""
        missing = self._plan_problem(candidate)
        if missing is not None:
            return [missing]
        return self._lowered(candidate, _captured(candidate)).problems

    def export(self, candidate: Candidate, data: Data, out: Path) -> Artifact:
        """Write `out` (a .tflite file) and describe it.

        Raises UnsupportedOpError when `problems` is not empty, ModelError when an integer file would hold a
        float that the plan does not ask for, OutputError when the file cannot be written.
        """
        missing = self._plan_problem(candidate)
        if missing is not None:
            raise ModelError(missing.reason)
        lowering, inputs, outputs = self.drafted(candidate)
        skipped = self._skipped(lowering.graph_module, lowering)
        draft = manifest.draft(
            candidate,
            data,
            path=out,
            target=self.target,
            inputs=[s for s, _ in inputs],
            outputs=[s for s, _ in outputs],
            skipped=skipped,
            made_with=("flatbuffers", "ai-edge-litert"),
        )
        return self._write(draft, lowering, inputs, outputs, out)

    def drafted(
        self, candidate: Candidate
    ) -> tuple[Lowering, list[tuple[TensorSpec, Tensor]], list[tuple[TensorSpec, Tensor]]]:
        """The file's operations in their final form, and its inputs and outputs; nothing is written.

        Raises UnsupportedOpError when `problems` is not empty.
        """
        graph_module = _captured(candidate)
        lowering = self._lowered(candidate, graph_module)
        if lowering.problems:
            raise UnsupportedOpError(_message(self.target, lowering.problems))
        inputs = self._inputs(candidate, graph_module, lowering)
        outputs = self._outputs(graph_module, lowering)
        _name_tensors(lowering, [t for _, t in inputs], [t for _, t in outputs])
        lowering.draft.clean([t for _, t in outputs])
        return lowering, inputs, outputs

    def _plan_problem(self, candidate: Candidate) -> Problem | None:
        numerics = TARGETS[self.target]
        plan = candidate.quantization
        if not numerics.integer:
            return None
        if plan is None:
            reason = (
                f"target {self.target!r} needs a quantized candidate; put a `quantize` step before the export"
            )
            return Problem("quantize", "", reason)
        bits = {q.spec.bits for q in plan.activations.values()}
        if bits and (numerics.activation_bits not in bits or bits - {8, 16}):
            reason = (
                f"target {self.target!r} needs activations of {numerics.activation_bits} bits (others may "
                f"have 8 or 16), the plan has {sorted(bits)}; quantize with "
                f"activation_bits={numerics.activation_bits}"
            )
            return Problem("quantize", "", reason)
        return None

    def _lowered(self, candidate: Candidate, graph_module: GraphModule) -> Lowering:
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        if len(placeholders) != len(candidate.inputs):
            raise ModelError(
                f"the graph has {len(placeholders)} inputs, the candidate names {len(candidate.inputs)}"
            )
        doors = [
            (spec.name, self._door(spec, node))
            for spec, node in zip(candidate.inputs, placeholders, strict=True)
        ]
        numerics = replace(
            TARGETS[self.target], group_size=self.group_size, restored=self.activations == "float"
        )
        lowering = Lowering(graph_module, candidate.quantization, numerics, doors)
        lowering.run()
        return lowering

    def _door(self, spec: TensorSpec, node: Node) -> Perm:
        """The stored layout of an input: channels last for pictures, unless NCHW was asked for."""
        rank = len(spec.shape)
        plain = identity(rank)
        if self.layout == "NCHW" or not node.meta["val"].is_floating_point():
            return plain
        if spec.layout == "NCHW" and rank == 4 or spec.layout == "NCW" and rank == 3:
            return channels_last(rank)
        if spec.layout == "" and rank == 4 and _reaches_spatial(node):
            return channels_last(rank)
        return plain

    def _inputs(
        self, candidate: Candidate, graph_module: GraphModule, lowering: Lowering
    ) -> list[tuple[TensorSpec, Tensor]]:
        nodes = graph_module.graph.find_nodes(op="placeholder")
        found = []
        for given, node in zip(candidate.inputs, nodes, strict=True):
            value = lowering.values[node]
            found.append((_spec(given.name, value.tensor, _layout_name(value, given.layout)), value.tensor))
        return found

    def _outputs(self, graph_module: GraphModule, lowering: Lowering) -> list[tuple[TensorSpec, Tensor]]:
        results = _flat(next(n for n in graph_module.graph.nodes if n.op == "output").args[0])
        names = self.output_names or tuple(
            "output" if len(results) == 1 else f"output_{i}" for i in range(len(results))
        )
        if len(names) != len(results):
            raise InputError(f"output_names has {len(names)} names, the model has {len(results)} outputs")
        found = []
        for name, node in zip(names, results, strict=True):
            value = self._at_the_door(lowering, node)
            found.append((_spec(name, value.tensor, _layout_name(value, "")), value.tensor))
        return found

    def _at_the_door(self, lowering: Lowering, node: Node) -> Value:
        """An output as it leaves: a picture stays channels last, all else is in torch's order."""
        value = lowering.input(node, node, as_stored=True)
        quant = lowering.quant_of(node)
        if quant is not None and value.tensor.quant is None and node.name not in lowering.plan.float_nodes:
            value = Value(lowering.quantize(node, value.tensor, quant), value.perm)
        pictures = self.layout == "NHWC" and len(value.perm) == 4
        if pictures and value.perm == channels_last(4):
            return value
        return lowering.relaid(node, value, identity(len(value.perm)))

    def _skipped(self, graph_module: GraphModule, lowering: Lowering) -> list[Problem]:
        """What stayed float in an integer file; raises ModelError for what should not have."""
        if not lowering.numerics.integer:
            return lowering.notes
        fused = fused_into(graph_module.graph)
        kept = dict(lowering.plan.float_nodes)
        allowed = {*kept, *(fused[n] for n in kept if n in fused)}
        surprises = tflite_check.unexpected_floats(lowering.draft, allowed)
        if surprises:
            listed = ", ".join(f"{code} {name!r}" for code, name in surprises[:5])
            raise ModelError(
                f"target {self.target!r} would hold {len(surprises)} float operations that the plan does not "
                f"name: {listed}; quantize again, or exclude those modules so that they are listed as float"
            )
        done = {tflite_check.node_of(name) for _, name in tflite_check.float_operations(lowering.draft)}
        nodes = {n.name: n for n in graph_module.graph.nodes}
        return [
            Problem(str(nodes[name].target), nodes[name].meta.get("module", ""), why)
            for name, why in kept.items()
            if name in nodes and (name in done or fused.get(name) in done)
        ]

    def _write(
        self,
        draft: Artifact,
        lowering: Lowering,
        inputs: Sequence[tuple[TensorSpec, Tensor]],
        outputs: Sequence[tuple[TensorSpec, Tensor]],
        out: Path,
    ) -> Artifact:
        metadata = {
            manifest.KEY: manifest.embedded(draft).encode(),
            LAYOUT_KEY: json.dumps(_layouts(lowering), separators=(",", ":"), sort_keys=True).encode(),
        }
        named = [[(spec.name, tensor) for spec, tensor in side] for side in (inputs, outputs)]
        try:
            content = serialize(lowering.draft, named[0], named[1], metadata)
        except OverflowError as error:
            raise OutputError(f"{out.name}: {error}") from error
        with files.atomic(out) as temporary:
            temporary.write_bytes(content)
            return manifest.describe(draft, temporary)


def _captured(candidate: Candidate) -> GraphModule:
    examples = tuple(torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in candidate.inputs)
    return capture(candidate.module, examples)


def _message(target: str, problems: Sequence[Problem]) -> str:
    lines = [f"{p.op} in {p.module or 'the model'}: {p.reason}" for p in problems[:8]]
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    return (
        f"target {target!r} cannot express {len(problems)} operations: {'; '.join(lines)}{more}. "
        "Replace these modules, or choose another target"
    )


def _reaches_spatial(node: Node) -> bool:
    """Does an operation on pictures read this input, perhaps after some arithmetic or padding?"""
    seen, waiting = set(), [node]
    while waiting:
        for user in waiting.pop().users:
            if user.target in _SPATIAL:
                return True
            if user not in seen and user.op == "call_function" and _same_rank(node, user):
                seen.add(user)
                waiting.append(user)
    return False


def _same_rank(node: Node, user: Node) -> bool:
    found = user.meta.get("val")
    return isinstance(found, torch.Tensor) and found.dim() == node.meta["val"].dim()


def _spec(name: str, tensor: Tensor, order: Layout) -> TensorSpec:
    quant = tensor.quant
    return TensorSpec(
        name,
        tensor.shape,
        tensor.dtype,
        order,
        None if quant is None else float(quant.scale[0]),
        None if quant is None else int(quant.zero_point[0]),
    )


def _layout_name(value: Value, given: Layout) -> Layout:
    if value.perm == identity(len(value.perm)):
        return given
    return "NHWC" if len(value.perm) == 4 else "NWC"


def _flat(result: object) -> list[Node]:
    if isinstance(result, Node):
        return [result]
    if isinstance(result, list | tuple):
        return [node for part in result for node in _flat(part)]
    raise ModelError(f"the model returns {result!r}; expected tensors")


def _name_tensors(lowering: Lowering, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Every node's result gets `module/node`; a tensor that several nodes share keeps the first name."""
    own: dict[int, str] = {id(t): t.name for t in inputs}
    for node, value in lowering.values.items():
        for i, part in enumerate(value if isinstance(value, list) else [value]):
            final = lowering.final(node)
            module = final.meta.get("module", "")
            name = f"{module}/{final.name}" if module else final.name
            if id(part.tensor) not in own and part.tensor.data is None:
                own[id(part.tensor)] = part.tensor.name = f"{name}:{i}" if isinstance(value, list) else name
    taken = set(own.values())
    for op in lowering.draft.ops:
        for tensor in (*op.inputs, *op.outputs):
            if tensor is not None and id(tensor) not in own and tensor.name in taken:
                tensor.name = lowering.draft.unique(tensor.name + ":raw")


def _layouts(lowering: Lowering) -> dict[str, list[int]]:
    """Tensor name -> layout, for results not stored in torch's order; [] when an axis is shuffled.

    Of several nodes that share a tensor, the layout is that of the first, which gave it the name.
    """
    first: dict[str, Value] = {}
    for value in lowering.values.values():
        if isinstance(value, Value):
            first.setdefault(value.tensor.name, value)
    return {
        name: [] if value.order is not None else list(value.perm)
        for name, value in first.items()
        if value.order is not None or value.perm != identity(len(value.perm))
    }
