"""The weights of a .tflite file as they are stored: bits per weight with their scales.

Field numbers are those of TFLite's schema, version 3: Model.subgraphs 2, SubGraph.tensors 0, Tensor.shape 0,
type 1, buffer 2, name 3, quantization 4; QuantizationParameters.scale 2, details 5 (BlockwiseQuantization:
scales 0, a tensor's index).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

from flatbuffers import number_types
from flatbuffers.table import Table

from edgecomp.errors import ArtifactError
from edgecomp.runtimes.litert_file import MODEL_BUFFERS, length_of, tables
from edgecomp.spec import StoredWeight

FEWEST = 256
_SUBGRAPHS, _TENSORS = 2, 0
_SHAPE, _TYPE, _BUFFER, _NAME, _QUANTIZATION = 0, 1, 2, 3, 4
_SCALE, _DETAILS = 2, 5
_TYPES = {0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 7: "int16", 9: "int8", 17: "int4"}
_PACKED_TABLE = "uint8"
"""Tables of bytes are ours: two 4-bit integers in each."""


def read(path: Path) -> list[StoredWeight]:
    """Every weight of the file once. Raises ArtifactError when the file is damaged."""
    content = path.read_bytes()
    try:
        return _read(content)
    except (struct.error, IndexError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged or cut short ({error}); export it again") from error


def _read(content: bytes) -> list[StoredWeight]:
    model = Table(content, struct.unpack_from("<I", content, 0)[0])
    sizes = [length_of(b, 0) for b in tables(model, MODEL_BUFFERS)]
    found: dict[int, StoredWeight] = {}
    for graph in tables(model, _SUBGRAPHS):
        tensors = tables(graph, _TENSORS)
        scales = {_text(t): sizes[_number(t, _BUFFER)] for t in tensors if _text(t).endswith(":scale")}
        apart = {_number(t, _BUFFER) for t in tensors if _text(t).endswith((":scale", ":zero_point"))}
        for tensor in tensors:
            buffer = _number(tensor, _BUFFER)
            if not buffer or not sizes[buffer] or buffer in found or buffer in apart:
                continue
            name, dtype = _text(tensor), _TYPES.get(_byte(tensor, _TYPE), "other")
            elements = math.prod(_integers(tensor, _SHAPE))
            if dtype == _PACKED_TABLE:
                elements, dtype = 2 * elements, "int4"
            own = _scale_bytes(tensor, tensors, sizes)
            size = sizes[buffer] + (own or scales.get(f"{name}:scale", 0))
            if elements >= FEWEST:
                found[buffer] = StoredWeight(name, elements, dtype, size)
    return list(found.values())


def _scale_bytes(tensor: Table, tensors: list[Table], sizes: list[int]) -> int:
    quantization = _inner(tensor, _QUANTIZATION)
    if quantization is None:
        return 0
    blockwise = _inner(quantization, _DETAILS)
    if blockwise is not None:
        return sizes[_number(tensors[_number(blockwise, 0)], _BUFFER)]
    return 4 * length_of(quantization, _SCALE)


def _inner(table: Table, field: int) -> Table | None:
    offset = table.Offset(4 + 2 * field)
    return Table(table.Bytes, table.Indirect(offset + table.Pos)) if offset else None


def _number(table: Table, field: int) -> int:
    offset = table.Offset(4 + 2 * field)
    return int(table.Get(number_types.Uint32Flags, offset + table.Pos)) if offset else 0


def _byte(table: Table, field: int) -> int:
    offset = table.Offset(4 + 2 * field)
    return int(table.Get(number_types.Int8Flags, offset + table.Pos)) if offset else 0


def _text(table: Table) -> str:
    offset = table.Offset(4 + 2 * _NAME)
    return bytes(table.String(offset + table.Pos)).decode("utf-8", "replace") if offset else ""


def _integers(table: Table, field: int) -> list[int]:
    offset = table.Offset(4 + 2 * field)
    if not offset:
        return []
    start = table.Vector(offset)
    return [table.Get(number_types.Int32Flags, start + 4 * i) for i in range(table.VectorLen(offset))]
