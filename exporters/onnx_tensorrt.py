"""`tensorrt-int8`: a QDQ file as TensorRT's explicit quantization wants it; the board builds the engine.

TensorRT multiplies int8 by int8 without zero points, so the plan's ranges become symmetric ones here (the
calibration is the same, and weights keep their integers). Q/DQ pairs stand where an int8 kernel reads, not
behind every value: NVIDIA's placement recommendations, TensorRT Developer Guide, "Explicit Quantization".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from onnx import ModelProto
from torch.fx import Graph, GraphModule, Node

from edgecomp import manifest
from edgecomp.errors import UnknownNameError, UnsupportedOpError
from edgecomp.exporters import onnx as qdq
from edgecomp.exporters import onnx_tensorrt_rules as rules
from edgecomp.exporters.onnx_lower import Lowering
from edgecomp.exporters.onnx_quant import is_integer_layer
from edgecomp.graph.vocabulary import WEIGHTED
from edgecomp.spec import (
    Artifact,
    Candidate,
    Data,
    Problem,
    QuantizationPlan,
    QuantSpec,
    TensorQuantization,
)

aten = torch.ops.aten

TARGET = "tensorrt-int8"
_SPEC = QuantSpec(bits=8, symmetric=True)
_PRODUCTS = {aten.matmul.default, aten.bmm.default}


@dataclass(frozen=True)
class TensorRTExporter:
    """Writes the .onnx file that `trtexec --int8 --fp16` turns into an engine on the board.

    `output_names`: in order; `output`, or `output_0` and so on, by default.
    """

    target: str = TARGET
    output_names: tuple[str, ...] = ()
    suffix: ClassVar[str] = ".onnx"

    def __post_init__(self) -> None:
        if self.target != TARGET:
            raise UnknownNameError("target", self.target, [TARGET])

    def problems(self, candidate: Candidate) -> list[Problem]:
        """What the file cannot express, or TensorRT cannot read, with the module each comes from."""
        found = qdq.OnnxExporter("onnx-qdq", self.output_names).problems(candidate)
        if found or candidate.quantization is None:
            return found
        bits = {q.spec.bits for q in candidate.quantization.activations.values()}
        if bits - {8}:
            reason = f"TensorRT has no activations of {max(bits)} bits; quantize with activation_bits=8"
            return [Problem("quantize", "", reason)]
        model, _ = self._model(candidate)
        return rules.problems(model)

    def export(self, candidate: Candidate, data: Data, out: Path) -> Artifact:
        """Write `out` (.onnx) and describe it.

        Raises UnsupportedOpError with each rule of TensorRT's that the model would break, ModelError when
        the file is not valid ONNX.
        """
        found = self.problems(candidate)
        if found:
            listed = "; ".join(f"{p.op} in {p.module or 'the model'}: {p.reason}" for p in found[:5])
            raise UnsupportedOpError(f"target {self.target!r} cannot express the model: {listed}")
        model, lowering = self._model(candidate)
        inputs, outputs = qdq.ends(candidate, lowering.graph_module, self.output_names)
        draft = manifest.draft(
            candidate, data, path=out, target=self.target, inputs=inputs, outputs=outputs,
            skipped=qdq.skipped(lowering.graph_module, candidate.quantization),
            made_with=("onnx", "onnxruntime"),
        )  # fmt: skip
        return qdq.write(draft, model, out)

    def _model(self, candidate: Candidate) -> tuple[ModelProto, Lowering]:
        graph_module = qdq.captured(candidate)
        plan = symmetric(graph_module, candidate.quantization or QuantizationPlan({}, {}))
        lowering = Lowering(graph_module, plan, float_bias=True)
        inputs, outputs = qdq.ends(candidate, graph_module, self.output_names)
        return lowering.model([i.name for i in inputs], [o.name for o in outputs]), lowering


def symmetric(graph_module: GraphModule, plan: QuantizationPlan) -> QuantizationPlan:
    """The plan with symmetric int8 ranges, kept only where an int8 kernel of TensorRT reads."""
    read = _read_as_integers(graph_module.graph, plan)
    kept = {name: _symmetric(q) for name, q in plan.activations.items() if name in read}
    return replace(plan, activations=kept)


def _symmetric(q: TensorQuantization) -> TensorQuantization:
    """The smallest symmetric range that holds the plan's: scale = largest magnitude / 127."""
    ends = [(limit - float(q.zero_point)) * float(q.scale) for limit in (q.spec.qmin, q.spec.qmax)]
    scale = max(abs(e) for e in ends) / _SPEC.qmax
    return TensorQuantization(_SPEC, np.array(scale, np.float32), np.array(0, np.int32))


def _read_as_integers(graph: Graph, plan: QuantizationPlan) -> set[str]:
    """Names of nodes that a convolution, product, average pooling or residual addition reads as int8."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op == "call_function" and node.name not in plan.float_nodes:
            found.update(n.name for n in _operands(node, plan))
    return found


def _operands(node: Node, plan: QuantizationPlan) -> list[Node]:
    if node.target in WEIGHTED:
        return [node.args[0]] if is_integer_layer(plan, node) else []
    if node.target is aten.avg_pool2d.default:
        return [node.args[0]]
    sides = [n for n in node.args[:2] if isinstance(n, Node)]
    both = len(sides) == 2 and all(n.name in plan.activations for n in sides)
    if node.target in _PRODUCTS:
        return sides if both else []
    if node.target is aten.add.Tensor and both:
        return _residual(sides)
    return []


def _residual(sides: list[Node]) -> list[Node]:
    """The operands of an addition that are rounded before it: not the one whose layer computes the sum.

    TensorRT fuses an addition into the convolution or product that alone feeds it.
    """
    if any(n.op == "get_attr" for n in sides):
        return []
    own = next((n for n in sides if n.target in WEIGHTED and len(n.users) == 1), None)
    return [n for n in sides if n is not own]
