"""Walks a canonical graph and lowers every node; knows layouts and numerics, no single operation.

Layouts move lazily: `permute` changes a tuple, and data is transposed when an operation asks for an order
that it is not stored in (see `tflite_layout`). Numerics: a node is computed in integers when the target is
an integer target and the plan has a scale for its output; at the border of a node that the plan leaves
float, QUANTIZE and DEQUANTIZE appear. TFLite's kernels have one width for what they read and write: a node
with 16 bits on any side is computed in 16, its int8 operands widened exactly before it, its int8 result
narrowed after it, by QUANTIZE from integer to integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node

from edgecomp.exporters import tflite_layout as layout
from edgecomp.exporters import tflite_numerics as numerics_of
from edgecomp.exporters.tflite_file import Draft, Quant, Tensor
from edgecomp.exporters.tflite_numerics import Numerics
from edgecomp.exporters.tflite_table import LOWERINGS, Unsupported
from edgecomp.graph import constants, fused_into
from edgecomp.graph.vocabulary import SAME_SCALE
from edgecomp.spec import Problem, QuantizationPlan

aten = torch.ops.aten

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float32",
    torch.float16: "float32",
    torch.int64: "int32",
    torch.int32: "int32",
    torch.int16: "int32",
    torch.int8: "int32",
    torch.uint8: "int32",
    torch.bool: "bool",
}
_ACTIVATIONS: dict[Any, str] = {aten.relu.default: "relu", aten.relu6.default: "relu6"}


@dataclass(eq=False)
class Value:
    """A node's result: the stored tensor, its layout, and a shuffle of one torch axis, if any.

    `order` = (axis, index): position i of the stored axis holds element index[i] of the torch axis.
    """

    tensor: Tensor
    perm: layout.Perm
    order: tuple[int, np.ndarray] | None = None

    @property
    def shape(self) -> layout.Shape:
        """In torch's order."""
        return layout.torch_shape(self.tensor.shape, self.perm)


class Lowering:
    """One conversion. After `run`: `draft`, `values`, `problems` (op, module, reason), `notes` on weights."""

    def __init__(
        self,
        graph_module: GraphModule,
        plan: QuantizationPlan | None,
        numerics: Numerics,
        doors: Sequence[tuple[str, layout.Perm]],
    ) -> None:
        """`doors`: name and layout of each input, in order."""
        self.graph_module = graph_module
        self.plan = plan if numerics.integer and plan is not None else QuantizationPlan({}, {})
        self.stored_plan = plan
        self.numerics = numerics
        self.draft = Draft()
        self.values: dict[Node, Any] = {}
        self.problems: list[Problem] = []
        self.notes: list[Problem] = []
        self._doors = iter(doors)
        self._fused = fused_into(graph_module.graph)
        self._nodes = {n.name: n for n in graph_module.graph.nodes}
        self._computed_early: dict[str, Value] = {}
        self._cache: dict[tuple[Any, ...], Tensor] = {}

    def run(self) -> None:
        """Lower all nodes; a node that cannot be lowered becomes a problem, and the walk goes on."""
        for node in self.graph_module.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._door(node)
            elif node.op == "call_function":
                self.values[node] = self._lower(node)

    def _door(self, node: Node) -> Value:
        name, perm = next(self._doors)
        shape = layout.stored_shape(tuple(node.meta["val"].shape), perm)
        quant = self.quant_of(node)
        dtype = quant.dtype if quant else self.dtype_of(node)
        return Value(Tensor(self.draft.unique(name), shape, dtype, quant), perm)

    def _lower(self, node: Node) -> Value | list[Value]:
        if node.name in self._computed_early:
            return self._computed_early[node.name]
        handler = LOWERINGS.get(node.target)
        try:
            if handler is None:
                raise Unsupported("no TFLite operation for it")
            made = handler(self, node)
        except Unsupported as reason:
            self.problem(node, str(reason))
            return self._stand_in(node)
        if isinstance(made, list):
            return made
        final = self.final(node)
        made = self._settle(final, made)
        if final is not node:
            self._computed_early[final.name] = made
        return made

    def problem(self, node: Node, reason: str) -> None:
        self.problems.append(Problem(str(node.target), node.meta.get("module", ""), reason))

    def _stand_in(self, node: Node) -> Value | list[Value]:
        """A tensor of the right shape that nobody computes, so that later problems are found as well."""
        found = node.meta["val"]
        if not isinstance(found, torch.Tensor):
            return [self._unmade(node, t) for t in found]
        return self._unmade(node, found)

    def _unmade(self, node: Node, like: torch.Tensor) -> Value:
        quant = self.quant_of(self.final(node))
        dtype = quant.dtype if quant else _DTYPES.get(like.dtype, "float32")
        return Value(Tensor(self.label(node), tuple(like.shape), dtype, quant), layout.identity(like.dim()))

    def _settle(self, node: Node, value: Value) -> Value:
        """Bring a result to the scale that the plan decided for it."""
        quant = self.quant_of(node)
        if quant is None or value.tensor.quant is None or quant.same(value.tensor.quant):
            return value
        made = Tensor(self.label(node), value.tensor.shape, quant.dtype, quant)
        self.draft.emit("QUANTIZE", [value.tensor], [made], "QuantizeOptions")
        return Value(made, value.perm, value.order)

    # What a node is

    def final(self, node: Node) -> Node:
        """The activation that is computed inside a node, or the node itself."""
        return self._nodes[self._fused[node.name]] if node.name in self._fused else node

    def fused_activation(self, node: Node) -> str:
        """`relu`, `relu6` or "": what the operation of a node also computes."""
        final = self.final(node)
        return "" if final is node else _ACTIVATIONS[final.target]

    def quant_of(self, node: Node) -> Quant | None:
        """The plan's quantization of a node's output, if the target uses it."""
        found = self.plan.activations.get(node.name)
        return None if found is None else numerics_of.quant(found)

    def is_integer(self, node: Node) -> bool:
        """Is the node computed in integers?"""
        final = self.final(node)
        floats = self.plan.float_nodes
        if not isinstance(node.meta["val"], torch.Tensor):  # split: it moves what it gets
            source = node.args[0]
            return node.name not in floats and isinstance(source, Node) and self.quant_of(source) is not None
        return node.name not in floats and final.name not in floats and self.quant_of(final) is not None

    def integer_dtype(self, node: Node) -> str:
        """int16 where the result or an operand of an integer node has 16 bits, else int8.

        What only moves values takes the width of its result.
        """
        final = self.final(node)
        sides = [final] if node.target in SAME_SCALE else [final, *node.all_input_nodes]
        wide = any((q := self.quant_of(n)) is not None and q.dtype == "int16" for n in sides)
        return "int16" if wide else "int8"

    def is_wide(self, node: Node) -> bool:
        """Is the node computed in integers of 16 bits?"""
        return self.is_integer(node) and self.integer_dtype(node) == "int16"

    def made_quant(self, node: Node) -> Quant | None:
        """The scale that the kernel of a node writes: the plan's, or one of 16 bits that is then narrowed."""
        quant = self.quant_of(self.final(node))
        if quant is None or quant.dtype == self.integer_dtype(node):
            return quant
        return numerics_of.narrowing(quant)

    def dtype_of(self, node: Node) -> str:
        """TFLite type of a node's output where it is not quantized; 64-bit integers become 32-bit ones."""
        found = _DTYPES.get(node.meta["val"].dtype)
        if found is None:
            raise Unsupported(f"dtype {node.meta['val'].dtype} does not exist in TFLite")
        return found

    def shape_of(self, node: Node) -> layout.Shape:
        return tuple(int(d) for d in node.meta["val"].shape)

    def label(self, node: Node, part: str = "") -> str:
        """`module/node`, or `module/node:part` for a tensor that is not a node's result."""
        module = node.meta.get("module", "")
        name = f"{module}/{node.name}" if module else node.name
        return self.draft.unique(f"{name}:{part}" if part else name)

    # Making tensors

    def result(
        self, node: Node, stored: layout.Shape, *, like: Tensor | None = None, quant: Quant | None = None
    ) -> Tensor:
        """The output tensor of a node; `like`: values are only moved, so dtype and scale stay."""
        final = self.final(node)
        if like is not None:
            return Tensor(self.label(final), stored, like.dtype, like.quant)
        if self.is_integer(node):
            found = quant or self.made_quant(node)
            dtype = found.dtype if found is not None else self.integer_dtype(node)
            return Tensor(self.label(final), stored, dtype, found)
        return Tensor(self.label(final), stored, self.dtype_of(node))

    def part(self, node: Node, what: str, stored: layout.Shape, like: Tensor) -> Tensor:
        """An intermediate tensor with the dtype and scale of another."""
        return Tensor(self.label(node, what), stored, like.dtype, like.quant)

    def numbers(self, values: Sequence[int] | int, name: str = "numbers") -> Tensor:
        """A constant of int32: axes, shapes, paddings."""
        return self.draft.constant(np.array(values, np.int32), name)

    def float_constant(self, array: np.ndarray, name: str) -> Tensor:
        """A float constant in the target's storage: float32, or float16 behind a DEQUANTIZE."""
        if self.numerics.weights != "float16" or array.size < 16:
            return self.draft.constant(np.ascontiguousarray(array, np.float32), name)
        limit = np.finfo(np.float16).max
        half = self.draft.constant(np.clip(array, -limit, limit).astype(np.float16), name + ":half")
        whole = Tensor(self.draft.unique(name), half.shape, "float32")
        return self.draft.emit("DEQUANTIZE", [half], [whole], "DequantizeOptions")

    def array_of(self, node: Node) -> np.ndarray:
        """The tensor behind a `get_attr` node."""
        return constants.value_of(self.graph_module, node).detach().cpu().numpy()

    # Reading inputs

    def input(
        self,
        node: Node,
        source: Any,
        *,
        perm: layout.Perm | None = None,
        as_stored: bool = False,
        keep_order: bool = False,
        any_width: bool = False,
    ) -> Value:
        """The value of `source` in the numerics of `node` and, if asked, in the layout `perm`.

        `as_stored`: whatever the numerics are. `keep_order`: the caller copes with a shuffled axis.
        `any_width`: the caller copes with 8 bits where the node has 16 elsewhere.
        """
        value = self.values[source] if source in self.values else self._constant_value(node, source)
        if not as_stored:
            value = self._in_numerics_of(node, source, value)
            if not any_width and self.is_wide(node):
                value = Value(self._widened(source, value.tensor), value.perm, value.order)
        if value.order is not None and not keep_order:
            value = self._unshuffled(node, value)
        return value if perm is None else self.relaid(node, value, perm)

    def _constant_value(self, node: Node, source: Any) -> Value:
        array = self.array_of(source)
        return Value(self.constant_operand(node, source, array), layout.identity(array.ndim))

    def constant_operand(self, node: Node, source: Any, array: np.ndarray, dtype: str = "") -> Tensor:
        """A constant (a number, or a `get_attr` node's array, perhaps rearranged) as an operand of `node`."""
        name = str(source.target) if isinstance(source, Node) else f"{node.name}:constant"
        if array.dtype == np.bool_ and dtype in ("", "bool"):
            return self.draft.constant(array, name)
        if np.issubdtype(array.dtype, np.integer) and dtype in ("", "int32"):
            limits = np.iinfo(np.int32)
            return self.draft.constant(np.clip(array, limits.min, limits.max).astype(np.int32), name)
        if not self.is_integer(node):
            return self.float_constant(array.astype(np.float32), name)
        return self._quantized_constant(node, source, array, name)

    def _quantized_constant(self, node: Node, source: Any, array: np.ndarray, name: str) -> Tensor:
        quant = self.quant_of(source) if isinstance(source, Node) else None
        if quant is not None:
            integers = numerics_of.quantized(array, quant, quant.dtype)
            made = self.draft.constant(integers, name, quant.dtype, quant)
            return self._widened(source, made) if self.is_wide(node) else made
        if array.size == 1:
            dtype = self.integer_dtype(node)
            integer, quant = numerics_of.exact(float(array.reshape(())), dtype)
            return self.draft.constant(np.full(array.shape, integer, dtype), name, dtype, quant)
        raise Unsupported(f"the plan has no scale for the constant {name!r}")

    def _in_numerics_of(self, node: Node, source: Node, value: Value) -> Value:
        tensor = value.tensor
        if tensor.dtype == "float32" and self.is_integer(node):
            quant = self.quant_of(source)
            if quant is None:
                raise Unsupported(f"its input {source.name!r} stays float and the plan has no scale for it")
            return Value(self.quantize(source, tensor, quant), value.perm, value.order)
        if tensor.quant is not None and not self.is_integer(node):
            return Value(self.dequantize(source, tensor), value.perm, value.order)
        return value

    def quantize(self, node: Node, tensor: Tensor, quant: Quant) -> Tensor:
        key = (id(tensor), "quantize", quant.dtype, quant.scale.tobytes(), quant.zero_point.tobytes())
        if key not in self._cache:
            made = Tensor(self.label(node, "quantized"), tensor.shape, quant.dtype, quant)
            self._cache[key] = self.draft.emit("QUANTIZE", [tensor], [made], "QuantizeOptions")
        return self._cache[key]

    def _widened(self, node: Node, tensor: Tensor) -> Tensor:
        """An int8 tensor in 16 bits, exactly; anything else as it is."""
        if tensor.quant is None or tensor.dtype != "int8":
            return tensor
        quant = numerics_of.widened(tensor.quant)
        if tensor.data is None:
            return self.quantize(node, tensor, quant)
        integers = numerics_of.widened_integers(tensor.data, tensor.quant)
        return self.draft.constant(integers, tensor.name, "int16", quant)

    def dequantize(self, node: Node, tensor: Tensor) -> Tensor:
        key = (id(tensor), "dequantize")
        if key not in self._cache:
            made = Tensor(self.label(node, "float"), tensor.shape, "float32")
            self._cache[key] = self.draft.emit("DEQUANTIZE", [tensor], [made], "DequantizeOptions")
        return self._cache[key]

    def requantized(self, node: Node, tensor: Tensor, quant: Quant | None) -> Tensor:
        """The tensor on another scale, where an operation wants equal ones."""
        if quant is None or tensor.quant is None or quant.same(tensor.quant):
            return tensor
        if tensor.data is not None:
            real = (tensor.data.astype(np.float32) - tensor.quant.zero_point[0]) * tensor.quant.scale[0]
            integers = numerics_of.quantized(real, quant, quant.dtype)
            return self.draft.constant(integers, tensor.name, quant.dtype, quant)
        return self.quantize(node, tensor, quant)

    def relaid(self, node: Node, value: Value, perm: layout.Perm) -> Value:
        """The value stored as `perm`: by nothing, a RESHAPE or a TRANSPOSE."""
        if value.perm == perm:
            return value
        move = layout.movement(value.perm, perm)
        key = (id(value.tensor), "relaid", move)
        if key not in self._cache:
            self._cache[key] = self._moved(node, value.tensor, move)
        return Value(self._cache[key], perm, value.order)

    def _moved(self, node: Node, tensor: Tensor, move: layout.Perm) -> Tensor:
        stored = tuple(tensor.shape[m] for m in move)
        if tensor.data is not None:
            moved = tensor.data.transpose(move)
            return self.draft.constant(moved, tensor.name, tensor.dtype, tensor.quant)
        if layout.keeps_order(tensor.shape, move):
            return self.reshape(node, tensor, stored)
        if len(move) > 6:
            raise Unsupported(f"a transpose of {len(move)} axes; TFLite's has at most 6")
        made = self.part(node, "transposed", stored, tensor)
        return self.draft.emit("TRANSPOSE", [tensor, self.numbers(move, "perm")], [made], "TransposeOptions")

    def reshape(
        self, node: Node, tensor: Tensor, stored: layout.Shape, result: Tensor | None = None
    ) -> Tensor:
        if tensor.shape == stored and result is None:
            return tensor
        made = result or self.part(node, "reshaped", stored, tensor)
        shape = np.array(stored, np.int32)
        return self.draft.emit(
            "RESHAPE", [tensor, self.numbers(stored, "shape")], [made], "ReshapeOptions", newShape=shape
        )

    def _unshuffled(self, node: Node, value: Value) -> Value:
        if value.order is None:
            return value
        axis, index = value.order
        made = self.part(node, "ordered", value.tensor.shape, value.tensor)
        inverse = self.numbers(np.argsort(index).tolist(), "order")
        self.draft.emit(
            "GATHER",
            [value.tensor, inverse],
            [made],
            "GatherOptions",
            axis=value.perm.index(axis),
            batchDims=0,
        )
        return Value(made, value.perm)
