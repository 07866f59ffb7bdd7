"""TensorRT's rules for explicit quantization, checked on the ONNX file without a board.

Sources: onnx-tensorrt's importer (`QuantDequantLinearHelper` and the convolutions in `onnxOpImporters.cpp`
of 10.1, `builtin_op_importers.cpp` of 8.5), its `docs/operators.md` of 8.5 and 10.0, and NVIDIA's TensorRT
Developer Guide, "Explicit Quantization". What this cannot see: how fast the engine is, and which tactics a
board has.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgecomp.spec import Problem

LOWEST_OPSET, HIGHEST_OPSET = 9, 17
"""What TensorRT 8.5 (JetPack 5.1) reads; 10.0 (JetPack 6) reads 9 to 20."""

# Not in the support matrix of 8.5, or of 10.0.
_UNSUPPORTED = {
    "BitShift", "Compress", "ConvInteger", "Det", "DynamicQuantizeLinear", "MatMulInteger",
    "MaxUnpool", "MatMulNBits", "QLinearConv", "QLinearMatMul", "Unique",
}  # fmt: skip
_QDQ = ("QuantizeLinear", "DequantizeLinear")
# Channel axis of the weight (input 1) that output channels lie on; Gemm's depends on transB.
_WEIGHT_AXIS = {"Conv": 0, "ConvTranspose": 1}
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class _File:
    """Who makes and who reads each value, and the initializers."""

    def __init__(self, model: ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.made_by = {o: n for n in self.nodes for o in n.output}
        self.constants = {i.name: i for i in model.graph.initializer}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {o.name for o in model.graph.output}

    def maker(self, name: str) -> str:
        """Kind of the operation that makes a value, or ""."""
        return self.made_by[name].op_type if name in self.made_by else ""

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[name])

    def is_stored(self, name: str) -> bool:
        """Is the value an initializer behind a DequantizeLinear?"""
        return self.maker(name) == "DequantizeLinear" and self.made_by[name].input[0] in self.constants


def problems(model: ModelProto) -> list[Problem]:
    """Every rule that the file breaks: operation, torch module (where the file says it), reason."""
    file = _File(model)
    found = [Problem("opset", "", reason) for reason in _opset(model)]
    for node in file.nodes:
        for reason in _broken(file, node):
            found.append(Problem(node.op_type, node.doc_string, reason))
    return found


def _opset(model: ModelProto) -> Iterator[str]:
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        yield f"opset {opset}; TensorRT 8.5 reads {LOWEST_OPSET} to {HIGHEST_OPSET}"


def _broken(file: _File, node: NodeProto) -> Iterator[str]:
    if node.op_type in _UNSUPPORTED or node.domain not in ("", "ai.onnx"):
        yield "not among the operations that TensorRT's ONNX parser reads"
    elif node.op_type in _QDQ:
        yield from _scale_and_zero_point(file, node)
        yield from _neighbours(file, node)
    elif node.op_type in _WEIGHTED:
        yield from _layer(file, node)


def _scale_and_zero_point(file: _File, node: NodeProto) -> Iterator[str]:
    if node.input[1] not in file.constants:
        yield "its scale is computed; TensorRT needs it when it builds the engine"
        return
    scale = file.array(node.input[1])
    if scale.dtype != np.float32 or not np.all(np.isfinite(scale)) or np.any(scale <= 0):
        yield f"its scale is {scale.dtype}, smallest {scale.min()}; TensorRT wants positive float32"
    stored = node.input[0] in file.constants
    if scale.size > 1 and not stored:
        yield f"{scale.size} scales for an activation; TensorRT has one per tensor there"
    if len(node.input) > 2 and node.input[2]:
        yield from _zero_point(file, node.input[2], scale.size)
    elif node.op_type == "QuantizeLinear":
        yield "no zero point, so ONNX makes it uint8; TensorRT quantizes to int8 alone"
    if stored and file.constants[node.input[0]].data_type != TensorProto.INT8:
        kind = TensorProto.DataType.Name(file.constants[node.input[0]].data_type)
        yield f"it restores {kind}; TensorRT restores INT8 (biases stay float)"


def _zero_point(file: _File, name: str, scales: int) -> Iterator[str]:
    if name not in file.constants:
        yield "its zero point is computed; TensorRT's are constant zeros"
        return
    zero = file.constants[name]
    if zero.data_type != TensorProto.INT8:
        yield f"it quantizes to {TensorProto.DataType.Name(zero.data_type)}; TensorRT quantizes to INT8 alone"
    elif np.any(file.array(name)):
        yield f"its zero point is {file.array(name).reshape(-1)[0]}; TensorRT quantizes symmetrically, with 0"
    elif file.array(name).size != scales:
        yield f"{file.array(name).size} zero points for {scales} scales"


def _neighbours(file: _File, node: NodeProto) -> Iterator[str]:
    """Q and DQ stand in pairs: integers never reach another operation or an output."""
    if node.op_type == "QuantizeLinear":
        others = [r.op_type for r in file.readers.get(node.output[0], []) if r.op_type != "DequantizeLinear"]
        if others or node.output[0] in file.outputs:
            yield f"its integers go to {others[0] if others else 'an output'}, not to a DequantizeLinear"
    elif node.input[0] not in file.constants and file.maker(node.input[0]) != "QuantizeLinear":
        yield "it restores integers that no QuantizeLinear made"


def _layer(file: _File, node: NodeProto) -> Iterator[str]:
    """All inputs of a layer with a weight are quantized, or none; the bias is a float constant."""
    sides = [file.maker(name) == "DequantizeLinear" for name in node.input[:2]]
    if any(sides) and not all(sides):
        which = "input" if not sides[0] else "weight"
        yield f"its {which} is float and the other quantized: TensorRT then has no int8 kernel for it"
    if len(node.input) > 2 and node.input[2] not in file.constants:
        yield "its bias is computed; TensorRT takes a float constant"
    weight = node.input[1]
    if all(sides) and file.is_stored(weight):
        yield from _weight_axis(file, node, file.made_by[weight])


def _weight_axis(file: _File, node: NodeProto, restored: NodeProto) -> Iterator[str]:
    count = file.array(restored.input[1]).size
    if count == 1:
        return
    settings = {a.name: helper.get_attribute_value(a) for a in restored.attribute}
    shape = list(file.constants[restored.input[0]].dims)
    axis = settings.get("axis", 1) % len(shape)
    wanted = _WEIGHT_AXIS.get(node.op_type, len(shape) - 1)
    if node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute):
        wanted = 0
    if axis != wanted:
        yield f"its weight has scales along axis {axis}; output channels lie on axis {wanted}"
    elif shape[axis] != count:
        yield f"{count} scales for {shape[axis]} output channels"
