"""ONNX targets: the canonical graph and the quantization plan, lowered node by node.

Written with `onnx.helper` rather than `torch.onnx.export`: the names of values are those of the graph, the
scales are the plan's, the opset is an old one, and the bytes depend on the candidate alone
(docs/decisions/onnx-lowering.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch
from onnx import helper
from torch.fx import GraphModule

from edgecomp import files, manifest
from edgecomp.errors import DataError, InputError, ModelError, UnknownNameError, UnsupportedOpError
from edgecomp.exporters import onnx_dynamic, onnx_int4, onnx_safe_x86
from edgecomp.exporters.onnx_lower import Lowering, results
from edgecomp.exporters.onnx_ops import OPS
from edgecomp.graph import capture
from edgecomp.numerics import groupwise
from edgecomp.spec import (
    Artifact,
    Candidate,
    Data,
    Layout,
    Problem,
    QuantizationPlan,
    StepRecord,
    TensorQuantization,
    TensorSpec,
)

TARGETS = ("onnx-dynamic", "onnx-fp32", "onnx-int4", "onnx-qdq")
_EMPTY = QuantizationPlan({}, {})
_LAYOUTS: dict[int, Layout] = {4: "NCHW", 3: "", 2: "NC"}


@dataclass(frozen=True)
class OnnxExporter:
    """Exports to one ONNX target. `output_names`: in order; `output`, or `output_0` and so on, by default.

    For `onnx-int4`, where no `quantize-weights` decided before: `group_size` (16, 32, 64 or 128 inputs) and
    `symmetric`. `accuracy_level`: how ONNX Runtime multiplies there, 0 its choice, 1 float32, 4 int8.
    `safe_x86` (`onnx-qdq`): no 8-bit product saturates on an x86 without VNNI; needs calibration data.
    """

    target: str = "onnx-qdq"
    output_names: tuple[str, ...] = ()
    group_size: int = 32
    symmetric: bool = True
    accuracy_level: int = 4
    safe_x86: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UnknownNameError("target", self.target, TARGETS)
        if self.group_size not in groupwise.SIZES:
            raise InputError(f"group_size is {self.group_size}; expected 16, 32, 64 or 128")
        if self.safe_x86 and self.target != "onnx-qdq":
            raise InputError(f"safe_x86 is a setting of onnx-qdq, not of {self.target}")
        if not 0 <= self.accuracy_level <= 4:
            raise InputError(f"accuracy_level is {self.accuracy_level}; expected 0 to 4")

    def problems(self, candidate: Candidate) -> list[Problem]:
        """Operations that ONNX cannot express, with the module each comes from."""
        if self.target == "onnx-qdq" and candidate.quantization is None:
            return [
                Problem("quantize", "", "the model has no quantization plan: quantize it first (--calib SRC)")
            ]
        found = []
        if self.target == "onnx-qdq" and candidate.quantization and not candidate.quantization.activations:
            reason = "its plan rounds weights alone (quantize-weights); export onnx-int4, or use quantize"
            found.append(Problem("activations", "", reason))
        for node in captured(candidate).graph.nodes:
            if node.op == "call_function" and node.target not in OPS:
                found.append(Problem(str(node.target), node.meta.get("module", ""), "no ONNX lowering"))
        return found

    def export(self, candidate: Candidate, data: Data, out: Path) -> Artifact:
        """Write the .onnx file and describe it. Raises UnsupportedOpError naming op and module."""
        problems = self.problems(candidate)
        if problems:
            listed = "; ".join(f"{p.op} in {p.module or 'the model'}: {p.reason}" for p in problems[:5])
            raise UnsupportedOpError(f"{self.target} cannot be exported: {listed}")
        candidate = self._spared(candidate, data)
        graph_module = captured(candidate)
        plan = candidate.quantization if self.target == "onnx-qdq" else None
        inputs, outputs = ends(candidate, graph_module, self.output_names)
        blocks, notes = self._blocks(candidate, graph_module)
        draft = manifest.draft(
            candidate, data, path=out, target=self.target, inputs=inputs, outputs=outputs,
            skipped=[*skipped(graph_module, plan), *notes], made_with=("onnx", "onnxruntime"),
        )  # fmt: skip
        dynamic = onnx_dynamic.stored_weights(graph_module) if self.target == "onnx-dynamic" else {}
        lowering = (
            onnx_int4.BlockLowering(graph_module, _EMPTY, blocks=blocks, accuracy_level=self.accuracy_level)
            if blocks
            else Lowering(graph_module, plan or _EMPTY, dynamic)
        )
        return write(draft, lowering.model([i.name for i in inputs], [o.name for o in outputs]), out)

    def _spared(self, candidate: Candidate, data: Data) -> Candidate:
        """The candidate as it is exported: with `safe_x86`, some weights rounded on larger scales."""
        if not self.safe_x86 or candidate.quantization is None:
            return candidate
        source = data.calibration or data.train or data.evaluation
        if source is None or len(source) == 0:
            raise DataError("safe_x86 rounds weights with their inputs in view: give --calib SRC")
        found = onnx_safe_x86.mend(captured(candidate), candidate.quantization, source)
        record = StepRecord("safe-x86", "export", {}, tuple(found.notes))
        return replace(
            candidate,
            module=found.graph_module,
            quantization=found.plan,
            history=(*candidate.history, record),
        )

    def _blocks(
        self, candidate: Candidate, graph_module: GraphModule
    ) -> tuple[dict[str, TensorQuantization], list[Problem]]:
        if self.target != "onnx-int4":
            return {}, []
        return onnx_int4.decided(graph_module, candidate.quantization, self.group_size, self.symmetric)


def write(draft: Artifact, model: onnx.ModelProto, out: Path) -> Artifact:
    """Check a model, give it the draft's facts, and write it. Raises ModelError."""
    helper.set_model_props(model, {manifest.KEY: manifest.embedded(draft)})
    _check(model, out)
    with files.atomic(out) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        return manifest.describe(draft, temporary)


def ends(
    candidate: Candidate, graph_module: GraphModule, output_names: Sequence[str]
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of the file; `output_names` may be empty."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    given = [s.name for s in candidate.inputs]
    inputs = [_spec(n, p.meta["val"]) for n, p in zip(given, placeholders, strict=True)]
    found = results(graph_module)
    plain = ["output"] if len(found) == 1 else [f"output_{i}" for i in range(len(found))]
    names = output_names or [f"{n}_value" if n in given else n for n in plain]
    outputs = [_spec(n, r.meta["val"]) for n, r in zip(names, found, strict=True)]
    return inputs, outputs


def captured(candidate: Candidate) -> GraphModule:
    example = tuple(torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in candidate.inputs)
    return capture(candidate.module, example)


def _spec(name: str, value: torch.Tensor) -> TensorSpec:
    layout = _LAYOUTS.get(value.dim(), "") if value.is_floating_point() else ""
    return TensorSpec(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), layout)


def skipped(graph_module: GraphModule, plan: QuantizationPlan | None) -> list[Problem]:
    nodes = {n.name: n for n in graph_module.graph.nodes}
    reasons = plan.float_nodes.items() if plan else ()
    return [Problem(str(nodes[n].target), nodes[n].meta.get("module", ""), why) for n, why in reasons]


def _check(model: onnx.ModelProto, out: Path) -> None:
    """ONNX's own checker and shape inference, before the file gets its name."""
    try:
        onnx.checker.check_model(model, full_check=model.ByteSize() < 2**30)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{out.name} is not valid ONNX: {first}; please report the model that did this"
        ) from error
