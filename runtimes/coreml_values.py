"""Values of a MIL program: types, immediate values, and tensors stored in `weight.bin`.

Source of the storage format: coremltools, `mlmodel/src/MILBlob/Blob/StorageFormat.hpp` (version 2): a
header of 64 bytes, then for every tensor 64 bytes of metadata (sentinel, type, size, offset of the data,
bits of padding) and the data, each aligned to 64 bytes. Values narrower than a byte are packed, see
`edgecomp.numerics.packing`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecomp.errors import ArtifactError
from edgecomp.numerics import packing
from edgecomp.runtimes.coreml_proto import MIL_pb2

_SENTINEL = 0xDEADBEEF

# MIL data type -> name. A name of fewer than 8 bits is held in a NumPy integer of 8.
_NAMES = {
    MIL_pb2.BOOL: "bool",
    MIL_pb2.STRING: "string",
    MIL_pb2.FLOAT16: "float16",
    MIL_pb2.FLOAT32: "float32",
    MIL_pb2.FLOAT64: "float64",
    MIL_pb2.INT8: "int8",
    MIL_pb2.INT16: "int16",
    MIL_pb2.INT32: "int32",
    MIL_pb2.INT64: "int64",
    MIL_pb2.INT4: "int4",
    MIL_pb2.UINT8: "uint8",
    MIL_pb2.UINT16: "uint16",
    MIL_pb2.UINT32: "uint32",
    MIL_pb2.UINT64: "uint64",
    MIL_pb2.UINT1: "uint1",
    MIL_pb2.UINT2: "uint2",
    MIL_pb2.UINT3: "uint3",
    MIL_pb2.UINT4: "uint4",
    MIL_pb2.UINT6: "uint6",
}
_SUB_BYTE = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
# Type codes of the storage format (not those of MIL).
_STORED = {
    1: "float16", 2: "float32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1",
    10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip


@dataclass(frozen=True)
class Type:
    """Type of a value. `shape` holds -1 where a dimension is only known when the program runs."""

    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def type_of(message: Any) -> Type:
    """The `Type` of a `ValueType` message; a state has the type that it wraps, a list that of its items."""
    kind = message.WhichOneof("type")
    if kind == "stateType":
        return type_of(message.stateType.wrappedType)
    if kind == "listType":
        return Type(f"list[{type_of(message.listType.type).dtype}]")
    if kind != "tensorType":
        return Type(str(kind))
    tensor = message.tensorType
    shape = tuple(d.constant.size if d.HasField("constant") else -1 for d in tensor.dimensions)
    return Type(_NAMES.get(tensor.dataType, f"type {tensor.dataType}"), shape)


def decode(message: Any, weights: Callable[[str], bytes]) -> np.ndarray | str | list[Any]:
    """A `Value` message as an array (a string as str, a list as list).

    `weights`: file name as the program spells it (`@model_path/weights/weight.bin`) -> the file's bytes.
    Raises ArtifactError when the data is damaged.
    """
    kind = message.WhichOneof("value")
    found = type_of(message.type)
    if kind == "blobFileValue":
        stored = message.blobFileValue
        return _from_file(weights(stored.fileName), stored.offset, found)
    immediate = message.immediateValue
    if immediate.WhichOneof("value") == "list":
        return [decode(v, weights) for v in immediate.list.values]
    if immediate.WhichOneof("value") != "tensor":
        raise ArtifactError(f"the program holds an immediate value of kind {immediate.WhichOneof('value')}")
    return _from_message(immediate.tensor, found)


def _from_message(tensor: Any, found: Type) -> np.ndarray | str:
    field = tensor.WhichOneof("value")
    if field == "strings":
        return str(tensor.strings.values[0]) if not found.shape else list(tensor.strings.values)  # type: ignore[return-value]
    if field == "bytes":
        return _from_bytes(tensor.bytes.values, found)
    if field is None and found.count:
        raise ArtifactError(f"a constant of shape {found.shape} holds no values; the file is damaged")
    if field is None:
        return np.zeros(found.shape, _numpy(found.dtype))
    values = np.array(getattr(tensor, field).values, dtype=_numpy(found.dtype))
    if values.size != found.count:
        raise ArtifactError(
            f"a constant of shape {found.shape} holds {values.size} values; the file is damaged"
        )
    return values.reshape(found.shape)


def _from_file(data: bytes, offset: int, found: Type) -> np.ndarray:
    if offset + 64 > len(data):
        raise ArtifactError(
            f"weight.bin has {len(data)} bytes; the program refers to offset {offset}: the file was cut short"
        )
    sentinel, code, size, start = struct.unpack_from("<IIQQ", data, offset)
    if sentinel != _SENTINEL:
        raise ArtifactError(f"weight.bin has no tensor at offset {offset}; the file is damaged")
    if _STORED.get(code) != found.dtype:
        raise ArtifactError(
            f"weight.bin holds {_STORED.get(code, code)} at offset {offset}; "
            f"the program expects {found.dtype}"
        )
    if start + size > len(data):
        raise ArtifactError(
            f"weight.bin has {len(data)} bytes; a tensor ends at {start + size}: the file was cut short"
        )
    return _from_bytes(data[start : start + size], found)


def _from_bytes(data: bytes, found: Type) -> np.ndarray:
    bits = _SUB_BYTE.get(found.dtype)
    try:
        if bits is not None:
            flat = packing.unpack(data, bits, found.count, signed=found.dtype == "int4")
        else:
            flat = np.frombuffer(data, _numpy(found.dtype), count=found.count)
    except ValueError as error:
        raise ArtifactError(f"a tensor of {found.dtype} {found.shape} is damaged: {error}") from error
    return flat.reshape(found.shape)


def _numpy(dtype: str) -> np.dtype:
    if dtype in _SUB_BYTE:
        return np.dtype(np.int8 if dtype == "int4" else np.uint8)
    try:
        return np.dtype(dtype)
    except TypeError:
        raise ArtifactError(
            f"the program holds values of {dtype}, which this runtime does not read"
        ) from None
