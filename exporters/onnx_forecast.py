"""Which kernels ONNX Runtime will make of a QDQ graph, told from the graph alone.

ONNX Runtime folds DequantizeLinear, operation, QuantizeLinear into one integer kernel for some operations
(qdq_selector_action_transformer.cc, ONNX Runtime 1.20 to 1.32). On x86 it first turns int8 activations into
uint8 (qdq_s8_to_u8.cc), but only where one operation reads the value: where several do it stays int8. An
operation between the two kinds is folded no more, nor is a convolution or product of int8: both then compute
in float.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx

from edgecomp.exporters.onnx import captured, ends
from edgecomp.exporters.onnx_lower import Lowering
from edgecomp.spec import Candidate, Forecast, QuantizationPlan

X86 = ("x86_64", "AMD64", "i686")

# Moves values: runs on integers where the pairs on both sides are of one kind.
_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Gather", "MaxPool", "Resize", "Expand"}
_MOVES |= {"DepthToSpace", "SpaceToDepth", "Slice", "Split", "Tile"}
_UNARY = {"AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax"}
_SEVERAL = {"Add", "Mul", "Concat"}
_WEIGHTED = {"Conv", "Gemm", "MatMul"}
_CLIPS = {"Relu", "Clip"}
_BORDERS = {"QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class _Graph:
    """Who makes and who reads each value. `unsigned`: whether int8 activations become uint8 (x86)."""

    graph: onnx.GraphProto
    unsigned: bool
    makers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    readers: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.graph.node:
            self.makers.update(dict.fromkeys(node.output, node))
            for value in node.input:
                self.readers.setdefault(value, []).append(node)

    def kind(self, dequantized: str) -> str | None:
        """`u8`, `s8`, or `const` for what a DequantizeLinear gives; None for a float."""
        node = self.makers.get(dequantized)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        maker = self.makers.get(node.input[0])
        if maker is None or maker.op_type != "QuantizeLinear":
            return "const"
        outputs = {o.name for o in self.graph.output}
        count = len(self.readers.get(dequantized, [])) + (dequantized in outputs)
        return "u8" if self.unsigned and count == 1 else "s8"

    def result(self, node: onnx.NodeProto, index: int = 0) -> str | None:
        """The kind of what an operation gives, a clipping activation behind it included; None: a float."""
        readers = self.readers.get(node.output[index], [])
        if len(readers) != 1:
            return None
        if readers[0].op_type in _CLIPS and node.op_type in _WEIGHTED:
            return self.result(readers[0])
        if readers[0].op_type != "QuantizeLinear":
            return None
        pairs = self.readers.get(readers[0].output[0], [])
        return self.kind(pairs[0].output[0]) if pairs else None

    def clipped(self, node: onnx.NodeProto) -> bool:
        """Is this a clipping activation whose bounds the rounding behind it has as well?"""
        return node.op_type in _CLIPS and self.result(node) is not None


def forecast(candidate: Candidate, target: str) -> list[Forecast]:
    """One row for each operation that the file will hold, in order; nothing is written or calibrated.

    `candidate`: with a plan whose scales may be any. It is told for this machine's processor. A target that
    uses no plan computes in float throughout. Raises UnsupportedOpError for what ONNX cannot express.
    """
    graph_module = captured(candidate)
    plan = candidate.quantization if target == "onnx-qdq" else None
    inputs, outputs = ends(candidate, graph_module, ())
    lowering = Lowering(graph_module, plan or QuantizationPlan({}, {}))
    model = lowering.model([i.name for i in inputs], [o.name for o in outputs])
    nodes = {label: node for node, label in lowering.labels.items()}
    return rows(model, nodes, unsigned=platform.machine() in X86)


def rows(model: onnx.ModelProto, nodes: dict[str, str], *, unsigned: bool) -> list[Forecast]:
    """`nodes`: value -> graph node. `unsigned`: int8 activations become uint8, as on x86."""
    whole = _Graph(model.graph, unsigned)
    found = []
    for node in model.graph.node:
        if node.op_type in _BORDERS or node.op_type == "Identity":
            continue
        runs, why = _runs(whole, node)
        value = value_name(whole, node)
        found.append(Forecast(value, node.op_type, node.doc_string, runs, why, nodes.get(value, "")))
    return found


def value_name(whole: _Graph, node: onnx.NodeProto) -> str:
    """The name of what an operation gives: of its rounded value, where a QDQ pair follows at once."""
    for reader in whole.readers.get(node.output[0], []):
        if reader.op_type == "QuantizeLinear":
            return str(reader.output[0]).removesuffix("_quantized")
    return str(node.output[0])


def _runs(whole: _Graph, node: onnx.NodeProto) -> tuple[str, str]:
    if whole.clipped(node):
        return "inside", "its bounds are those of the rounding behind it"
    kinds = _operands(whole, node)
    given = whole.result(node)
    if all(k is None for k in kinds) and given is None:
        return "float", "no quantized value around it"
    if node.op_type not in _MOVES | _UNARY | _SEVERAL | _WEIGHTED:
        return "float", f"ONNX Runtime has no integer kernel for {node.op_type}"
    if kinds[0] is None or None in kinds:
        return "float", "an operand arrives as a float"
    if whole.unsigned and node.op_type in _WEIGHTED and kinds[0] == "s8":
        return "float", "on x86 it takes uint8 only, and its operand stays int8: several operations read it"
    if node.op_type == "MatMul" and given is None:
        return "integer", "with a float result"
    if given is None and node.op_type != "Gemm":
        return "float", "its result is not rounded at once"
    others = [whole.result(node, i) for i in range(1, len(node.output))]
    if None in others:
        return "float", "a part of its result is not rounded at once"
    wanted = {k for k in [*kinds, given, *others] if k is not None}
    if node.op_type in _WEIGHTED:
        wanted = {k for k in (kinds[0], given) if k is not None}
    if "const" in wanted and node.op_type not in _WEIGHTED:
        wanted = (wanted - {"const"}) | {"s8"}
    if len(wanted) > 1:
        return "float", "one side is uint8 and the other int8, because several operations read a value"
    return "integer", ""


def _operands(whole: _Graph, node: onnx.NodeProto) -> Sequence[str | None]:
    """Kinds of the operands that hold activations or weights."""
    count = 1 if node.op_type in _MOVES | _UNARY else 2 if node.op_type in _WEIGHTED else len(node.input)
    return [whole.kind(value) for value in node.input[:count]]
