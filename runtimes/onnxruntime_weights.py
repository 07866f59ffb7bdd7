"""The weights of an .onnx file as they are stored: bits per weight with scales and zero points."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from edgecomp.spec import StoredWeight

FEWEST = 256
"""Constants with fewer elements are no weights worth a line."""
_BLOCKED = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
_QUARTERS = {TensorProto.INT4, TensorProto.UINT4}


def read(path: Path) -> list[StoredWeight]:
    """Every weight of the file once, in the order of first use."""
    graph = onnx.load(str(path)).graph
    initializers = {t.name: t for t in graph.initializer}
    found: dict[str, StoredWeight] = {}
    used: set[str] = set()
    for weight in _blocked(graph, initializers, used):
        found.setdefault(weight.name, weight)
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in initializers:
            parts = [initializers[n] for n in node.input if n in initializers]
            used.update(n for n in node.input if n in initializers)
            name, stored = _plain(node.input[0]), parts[0]
            size = sum(map(_bytes, parts))
            found.setdefault(name, StoredWeight(name, _count(stored), _dtype(stored), size))
    for name, tensor in initializers.items():
        if name not in used:
            found.setdefault(name, StoredWeight(name, _count(tensor), _dtype(tensor), _bytes(tensor)))
    return [w for w in found.values() if w.elements >= FEWEST]


def _blocked(
    graph: onnx.GraphProto, initializers: dict[str, TensorProto], used: set[str]
) -> Iterator[StoredWeight]:
    """Operands of MatMulNBits and GatherBlockQuantized; a table may come through a Reshape."""
    through = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Reshape"}
    for node in graph.node:
        if node.op_type not in _BLOCKED:
            continue
        position = _BLOCKED[node.op_type]
        data = through.get(node.input[position], node.input[position])
        names = [data, *(n for i, n in enumerate(node.input) if i != position and n in initializers)]
        bits = next(int(a.i) for a in node.attribute if a.name == "bits")
        parts = [initializers[n] for n in names if not n.endswith(".bias") and n in initializers]
        scale = next(t for t in parts if t.data_type == TensorProto.FLOAT)
        block = next(int(a.i) for a in node.attribute if a.name == "block_size")
        used.update(t.name for t in parts)
        count = {a.name: int(a.i) for a in node.attribute}
        elements = count["N"] * count["K"] if "N" in count else _count(scale) * block
        size = sum(_bytes(t) for t in parts if t.data_type != TensorProto.FLOAT or t is scale)
        yield StoredWeight(_plain(data), elements, f"uint{bits}", size)


def _plain(name: str) -> str:
    return name.removesuffix("_blocks").removesuffix("_turned").removesuffix("_quantized")


def _count(tensor: TensorProto) -> int:
    return math.prod(tensor.dims)


def _bytes(tensor: TensorProto) -> int:
    if tensor.data_type in _QUARTERS:
        return -(-_count(tensor) // 2)
    return _count(tensor) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _dtype(tensor: TensorProto) -> str:
    return str(helper.tensor_dtype_to_np_dtype(tensor.data_type))
