"""Weights of 2, 4 or 8 bits in blocks: MatMulNBits and GatherBlockQuantized, operators of ONNX Runtime.

Source: ONNX Runtime, docs/ContribOperators.md (`com.microsoft`). A weight [N, K] is stored as bytes
[N, blocks, block * bits / 8], the earlier values in the lower bits, unsigned, with zero point 2^(bits-1)
unless zero points [N, blocks * bits / 8] are given; scales [N, blocks] are float32. A head that is tied
to the embedding reads the same bytes: the embedding sees them as a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from onnx import helper
from torch.fx import GraphModule, Node

from edgecomp.exporters.onnx_graph import Builder
from edgecomp.exporters.onnx_lower import Lowering
from edgecomp.graph import constants
from edgecomp.numerics import groupwise
from edgecomp.numerics.groupwise import Grid
from edgecomp.spec import Problem, QuantizationPlan, TensorQuantization

aten = torch.ops.aten

DOMAIN = "com.microsoft"
_OPSET_VERSION = 1
_STORED = (2, 4, 8)
"""Bits that both operators hold (ONNX Runtime 1.31.1); other widths take the next wider one."""
_FEWEST = 256
"""A weight with fewer elements stays float: it would save nothing."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """A weight as the operators take it. `packed` uint8 [N, blocks, bytes], `scale` float32 [N, blocks].

    `zero` uint8 [N, bytes] or None where every zero point is 2^(bits-1); `size`: inputs of a block.
    """

    packed: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    size: int
    bits: int
    shape: tuple[int, int]


def packed(q: TensorQuantization) -> Blocks:
    """The plan's integers as bytes. One scale a channel is repeated for blocks that the kernels know."""
    scale, zero, group = groupwise.in_groups(q)
    if q.values is None:
        raise ValueError("a stored weight has integers")
    outputs, inputs = q.values.shape
    size = group if group in groupwise.SIZES else groupwise.group_for(inputs, 128)
    size = size if size in groupwise.SIZES else 32
    count = -(-inputs // size)
    if scale.shape[1] != count:
        scale, zero = (np.repeat(part, count // scale.shape[1], axis=1) for part in (scale, zero))
    bits = stored_bits(q)
    half = 1 << (bits - 1)
    stored = np.full((outputs, count * size), half, np.uint8)
    stored[:, :inputs] = (q.values.astype(np.int16) + half).astype(np.uint8)
    zeros = (zero + half).astype(np.uint8)
    return Blocks(
        _in_bytes(stored, bits).reshape(outputs, count, -1),
        np.ascontiguousarray(scale, np.float32),
        None if not zero.any() else _in_bytes(zeros, bits),
        size,
        bits,
        (outputs, inputs),
    )


def stored_bits(q: TensorQuantization) -> int:
    """The width that a weight takes in the file."""
    return next(bits for bits in _STORED if bits >= q.spec.bits)


def widened(q: TensorQuantization, module: str) -> list[Problem]:
    """What to say where the file holds wider integers than the plan."""
    bits = stored_bits(q)
    if bits == q.spec.bits:
        return []
    told = f"{q.spec.bits} bits are stored in {bits}: ONNX Runtime's operators hold 2, 4 or 8"
    return [Problem("MatMulNBits", module, told)]


def _in_bytes(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, n] -> bytes [rows, ceil(n * bits / 8)]."""
    each = 8 // bits
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % each)))
    parts = values.reshape(len(values), -1, each) << (bits * np.arange(each, dtype=np.uint8))
    return np.bitwise_or.reduce(parts, axis=-1).astype(np.uint8)


def store(b: Builder, name: str, q: TensorQuantization) -> tuple[Blocks, str, str, str]:
    """The initializers of a weight: names of bytes, scales and zero points ("" for none)."""
    blocks = packed(q)
    data = b.constant(blocks.packed, np.uint8, f"{name}_blocks")
    scale = b.constant(blocks.scale, np.float32, f"{name}_scale")
    zero = "" if blocks.zero is None else b.constant(blocks.zero, np.uint8, f"{name}_zero_point")
    return blocks, data, scale, zero


def matmul(
    b: Builder, x: str, name: str, q: TensorQuantization, bias: str = "", accuracy_level: int = 0
) -> str:
    """x [..., K] times the weight [N, K]; `accuracy_level` 4: activations in int8, block by block."""
    blocks, data, scale, zero = store(b, name, q)
    inputs = [x, data, scale, zero, "", bias]
    while not inputs[-1]:
        inputs.pop()
    return b.op(
        "MatMulNBits", inputs, domain=DOMAIN, N=blocks.shape[0], K=blocks.shape[1], bits=blocks.bits,
        block_size=blocks.size, accuracy_level=accuracy_level,
    )  # fmt: skip


def gather(b: Builder, ids: str, name: str, q: TensorQuantization) -> str:
    """Rows of a table, restored to float."""
    blocks, data, scale, zero = store(b, name, q)
    rows = b.op("Reshape", [data, b.constant([blocks.shape[0], -1], np.int64)])
    inputs = [rows, ids, scale] + ([zero] if zero else [])
    return b.op(
        "GatherBlockQuantized", inputs, domain=DOMAIN, bits=blocks.bits, block_size=blocks.size,
        gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def decided(
    graph_module: GraphModule, plan: QuantizationPlan | None, group_size: int, symmetric: bool
) -> tuple[dict[str, TensorQuantization], list[Problem]]:
    """The integers of every linear layer and table, and what stays float or was rounded another way.

    A plan of weights alone is taken as it is; without one, weights are rounded here on searched scales.
    """
    given = plan if plan is not None and not plan.activations else None
    found: dict[str, TensorQuantization] = {}
    problems: list[Problem] = []
    for node in graph_module.graph.nodes:
        source = weight_of(node)
        if source is None:
            continue
        name, module = str(source.target), node.meta.get("module", "")
        if given is not None:
            if name in given.weights and node.name not in given.float_nodes:
                found[name] = given.weights[name]
                problems += widened(found[name], module)
            else:
                reason = given.float_nodes.get(node.name, "the plan has no integers for its weight")
                problems.append(Problem(str(node.target), module, reason))
            continue
        value = constants.value_of(graph_module, source).detach().numpy()
        if value.size < _FEWEST:
            reason = f"{value.size} weights; at least {_FEWEST} are needed for blocks to pay"
            problems.append(Problem(str(node.target), module, reason))
        elif name not in found:
            found[name] = _rounded(value, group_size, symmetric)
            used = found[name].spec.group_size
            if used != group_size:
                told = "one scale an output" if used is None else f"groups of {used}"
                reason = f"{told}, not groups of {group_size}, which do not divide {value.shape[1]} inputs"
                problems.append(Problem(str(node.target), module, reason))
    return found, problems


def weight_of(node: Node) -> Node | None:
    """The stored weight [out, in] of a linear layer, or the table of an embedding."""
    if node.op != "call_function":
        return None
    position = {aten.linear.default: 1, aten.embedding.default: 0}.get(node.target)
    source = None if position is None else node.args[position]
    return source if constants.is_constant(source) else None


def _rounded(value: np.ndarray, group_size: int, symmetric: bool) -> TensorQuantization:
    grid = Grid(4, symmetric, groupwise.group_for(value.shape[1], group_size))
    scale, zero = groupwise.searched(value, grid)
    integers = groupwise.round_to(value, scale, zero, grid)
    return groupwise.assemble(integers, scale, zero, grid, value.shape)


@dataclass
class BlockLowering(Lowering):
    """The graph with every weight of `blocks` stored in blocks."""

    blocks: Mapping[str, TensorQuantization] = field(default_factory=dict)
    accuracy_level: int = 0

    def model(self, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
        made = super().model(inputs, outputs)
        made.opset_import.append(helper.make_opsetid(DOMAIN, _OPSET_VERSION))
        return made

    def _blocks_of(self, node: Node) -> TensorQuantization | None:
        source = weight_of(node)
        return None if source is None else self.blocks.get(str(source.target))

    def _stores(self, layer: Node, operand: Node) -> bool:
        if self._blocks_of(layer) is not None:
            return operand is weight_of(layer) or operand in layer.args[2:3]
        return super()._stores(layer, operand)

    def _lowered(self, b: Builder, node: Node) -> str | list[str]:
        q = self._blocks_of(node)
        if q is None:
            return super()._lowered(b, node)
        name = self.stored[str(weight_of(node).target)]  # type: ignore[union-attr]
        if node.target is aten.embedding.default:
            return gather(b, b.take(node.args[1]), name, q)
        return matmul(b, b.take(node.args[0]), name, q, self._bias(b, node) or "", self.accuracy_level)
