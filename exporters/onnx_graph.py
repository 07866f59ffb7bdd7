"""Building an ONNX graph: nodes, initializers and names, deterministic to the byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch.fx import Node

OPSET = 17
"""Runs on ONNX Runtime 1.12 and later; IR version 8 goes with it."""
OPSET_16_BIT = 21
"""QuantizeLinear of 16 bits and 4-bit initializers begin here (ONNX Runtime 1.20)."""
IR_VERSION = {OPSET: 8, OPSET_16_BIT: 10}

INT32 = TensorProto.INT32


@dataclass
class Builder:
    """Collects an ONNX graph. `names[node]` is the value that readers of a graph node take."""

    opset: int = OPSET
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    module: str = ""
    _count: int = 0

    def constant(self, value: Any, dtype: Any = None, name: str = "") -> str:
        """An initializer; equal ones of one name are stored once."""
        array = np.asarray(value, dtype=dtype, order="C")
        name = name or self._free("constant")
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def integers(self, values: Sequence[int] | int) -> str:
        return self.constant(values, np.int64)

    def op(self, kind: str, inputs: Sequence[str], *, name: str = "", **attributes: Any) -> str:
        """One node with one output; the output's name is given or made up."""
        return self.ops(kind, inputs, 1, [name] if name else (), **attributes)[0]

    def ops(
        self, kind: str, inputs: Sequence[str], count: int, names: Sequence[str] = (), **attributes: Any
    ) -> list[str]:
        outputs = list(names) or [self._free(kind.lower()) for _ in range(count)]
        present = {k: v for k, v in attributes.items() if v is not None}
        node = helper.make_node(kind, list(inputs), outputs, name=f"{kind}_{len(self.nodes)}", **present)
        if self.module:
            node.doc_string = self.module
        self.nodes.append(node)
        return outputs

    def _free(self, stem: str) -> str:
        self._count += 1
        return f"{stem}/{self._count}"  # no Python name has a slash

    def take(self, node: Node) -> str:
        return self.names[node.name]


Lower = Callable[[Builder, Node], str | list[str]]


def rename_output(builder: Builder, old: str, new: str) -> None:
    """Give the result of the last lowering its final name."""
    for node in reversed(builder.nodes):
        for index, output in enumerate(node.output):
            if output == old:
                node.output[index] = new
                return
    builder.op("Identity", [old], name=new)  # an input or an initializer handed on
