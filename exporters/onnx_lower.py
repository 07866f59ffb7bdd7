"""A canonical graph and its plan -> an ONNX model, node by node."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch.fx import GraphModule, Node

from edgecomp.exporters import onnx_dynamic, onnx_quant, onnx_shape
from edgecomp.exporters.onnx_graph import IR_VERSION, OPSET, OPSET_16_BIT, Builder, rename_output
from edgecomp.exporters.onnx_ops import DTYPES, OPS
from edgecomp.graph import constants
from edgecomp.graph.vocabulary import WEIGHTED
from edgecomp.spec import QuantizationPlan, TensorQuantization

FAMILIES = (onnx_shape,)  # importing a family fills the table of lowerings

aten = torch.ops.aten

_SHARED = 256
"""Elements from which constants that are no layer's weight are stored once where they are equal."""


@dataclass
class Lowering:
    """`plan`: static quantization. `dynamic`: int8 weights by name, for activations quantized at run time.

    `float_bias`: biases of quantized layers stay float, as TensorRT wants them.
    """

    graph_module: GraphModule
    plan: QuantizationPlan
    dynamic: Mapping[str, TensorQuantization] = field(default_factory=dict)
    float_bias: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    _tables: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)

    def model(self, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
        """The ONNX model; inputs and outputs are float at the door."""
        wide = any(q.spec.bits == 16 for q in self.plan.activations.values())
        b = Builder(OPSET_16_BIT if wide else OPSET)
        self.stored, self.labels = _names(self.graph_module, [*inputs, *outputs])
        given = iter(inputs)
        for node in self.graph_module.graph.nodes:
            b.module = node.meta.get("module", "")
            if node.op == "placeholder":
                self._finish(b, node, next(given))
            elif node.op == "get_attr":
                self._constant(b, node)
            elif node.op == "call_function":
                self._call(b, node)
        b.module = ""
        for name, result in zip(outputs, results(self.graph_module), strict=True):
            b.op("Identity", [b.take(result)], name=name)
        _drop_identities(b, set(outputs))
        return _assemble(b, self.graph_module, inputs, outputs)

    def _value(self, node: Node) -> np.ndarray:
        return constants.value_of(self.graph_module, node).detach().numpy()

    def _finish(self, b: Builder, node: Node, value: str) -> None:
        q = self.plan.activations.get(node.name)
        b.names[node.name] = (
            value if q is None else onnx_quant.round_value(b, value, self.labels[node.name], q)
        )

    def _constant(self, b: Builder, node: Node) -> None:
        q = self.plan.activations.get(node.name)
        if q is not None:
            b.names[node.name] = onnx_quant.stored_constant(b, self._value(node), self.labels[node.name], q)
        elif any(not self._stores(user, node) for user in node.users):
            array = self._value(node)
            b.names[node.name] = b.constant(array, name=self._name_of(node, array))

    def _name_of(self, node: Node, array: np.ndarray) -> str:
        """A constant's own name; of equal large tables (rotations and masks of every layer) the first's."""
        name = self.stored[str(node.target)]
        if array.size < _SHARED or any(user.target in WEIGHTED for user in node.users):
            return name
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
        return self._tables.setdefault(key, name)

    def _stores(self, layer: Node, operand: Node) -> bool:
        """Whether a layer writes this weight or bias itself, in integers."""
        if onnx_quant.is_integer_layer(self.plan, layer):
            return operand in layer.args[1 : 2 if self.float_bias else 3]
        if not self._is_dynamic(layer):
            return False
        return operand is layer.args[1] or layer.target is aten.linear.default and operand in layer.args[2:3]

    def _is_dynamic(self, node: Node) -> bool:
        return onnx_dynamic.is_stored(node) and str(node.args[1].target) in self.dynamic

    def _call(self, b: Builder, node: Node) -> None:
        before = dict(b.names)
        value = self._lowered(b, node)
        b.names = before
        if isinstance(value, list):
            b.names.update({f"{node.name}.{i}": v for i, v in enumerate(value)})
            return
        made = value not in b.initializers and value not in before.values()
        if node.name not in self.plan.activations and made:
            rename_output(b, value, self.labels[node.name])
            value = self.labels[node.name]
        self._finish(b, node, value)

    def _bias(self, b: Builder, node: Node) -> str | None:
        bias = node.args[2] if len(node.args) > 2 else None
        return None if bias is None else b.constant(self._value(bias), name=self.stored[str(bias.target)])

    def _lowered(self, b: Builder, node: Node) -> str | list[str]:
        if onnx_quant.is_integer_layer(self.plan, node):
            b.names.update(onnx_quant.layer_operands(b, node, self.plan, self._value, self.float_bias))
        elif self._is_dynamic(node):
            weight = self.dynamic[str(node.args[1].target)]
            if node.target is aten.linear.default:
                return onnx_dynamic.linear(b, node, weight, self._bias(b, node))
            b.names[node.args[1].name] = onnx_dynamic.float_layer_weight(b, node, weight)
        return OPS[node.target](b, node)


def _names(graph_module: GraphModule, taken: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Names in the file of stored tensors (by target) and of values (by node): their own, where free.

    `taken`: the names of inputs and outputs, which users chose.
    """
    nodes, used = list(graph_module.graph.nodes), set(taken)
    targets = dict.fromkeys(str(n.target) for n in nodes if n.op == "get_attr")
    stored = {target: _free(target, used) for target in targets}
    return stored, {n.name: _free(n.name, used) for n in nodes}


def _free(name: str, used: set[str]) -> str:
    while name in used:
        name += "_value"
    used.add(name)
    return name


def results(graph_module: GraphModule) -> list[Node]:
    """The nodes that the graph gives back, in order."""
    found: list[Node] = []
    torch.fx.node.map_arg(graph_module.graph.find_nodes(op="output")[0].args, found.append)
    return found


def _drop_identities(b: Builder, outputs: set[str]) -> None:
    """An output's name moves to the node that computes it, where that has no other reader."""
    readers: dict[str, int] = {}
    for node in b.nodes:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    makers = {o: n for n in b.nodes for o in n.output}
    for node in [n for n in b.nodes if n.op_type == "Identity" and n.output[0] in outputs]:
        source = node.input[0]
        if readers[source] == 1 and source in makers and source not in outputs:
            maker = makers[source]
            maker.output[list(maker.output).index(source)] = node.output[0]
            b.nodes.remove(node)


def _assemble(
    b: Builder, graph_module: GraphModule, inputs: Sequence[str], outputs: Sequence[str]
) -> onnx.ModelProto:
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    graph = helper.make_graph(
        b.nodes,
        "edgecomp",
        [_info(n, p) for n, p in zip(inputs, placeholders, strict=True)],
        [_info(n, r) for n, r in zip(outputs, results(graph_module), strict=True)],
        list(b.initializers.values()),
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", b.opset)],
        ir_version=IR_VERSION[b.opset],
        producer_name="edgecomp",
    )


def _info(name: str, node: Node) -> onnx.ValueInfoProto:
    value = node.meta["val"]
    return helper.make_tensor_value_info(name, DTYPES.get(value.dtype, TensorProto.FLOAT), list(value.shape))
