"""Tensors in `weight.bin`: reading those that coremltools wrote, writing ours.

Source of the storage format: coremltools, `mlmodel/src/MILBlob/Blob/StorageFormat.hpp` (version 2): a
header of 64 bytes (count of tensors, version), then for every tensor 64 bytes of metadata and its data, each
aligned to 64 bytes.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np

from edgecomp.exporters.coreml_toolkit import MIL_pb2
from edgecomp.numerics import packing

FILE_NAME = "@model_path/weights/weight.bin"
_SENTINEL = 0xDEADBEEF
_ALIGNMENT = 64
# MIL's data type -> (type code of the storage format, bits).
_STORED = {
    MIL_pb2.FLOAT16: (1, 16),
    MIL_pb2.FLOAT32: (2, 32),
    MIL_pb2.UINT8: (3, 8),
    MIL_pb2.INT8: (4, 8),
    MIL_pb2.INT16: (6, 16),
    MIL_pb2.UINT16: (7, 16),
    MIL_pb2.INT4: (8, 4),
    MIL_pb2.UINT1: (9, 1),
    MIL_pb2.UINT2: (10, 2),
    MIL_pb2.UINT4: (11, 4),
    MIL_pb2.UINT3: (12, 3),
    MIL_pb2.UINT6: (13, 6),
    MIL_pb2.INT32: (14, 32),
    MIL_pb2.UINT32: (15, 32),
}
_FLOATS = {MIL_pb2.FLOAT16: np.float16, MIL_pb2.FLOAT32: np.float32}


def stored_bytes(weights: bytes, offset: int) -> bytes:
    """The data of the tensor whose metadata is at `offset`."""
    _, _, size, start = struct.unpack_from("<IIQQ", weights, offset)
    return weights[start : start + size]


def float_array(value: Any, weights: bytes) -> np.ndarray | None:
    """A `Value` message stored in the file as a float array; None when it is not of a float type."""
    tensor = value.type.tensorType
    dtype = _FLOATS.get(tensor.dataType)
    if dtype is None or value.WhichOneof("value") != "blobFileValue":
        return None
    shape = [d.constant.size for d in tensor.dimensions]
    return np.frombuffer(stored_bytes(weights, value.blobFileValue.offset), dtype).reshape(shape)


def immediate_array(value: Any) -> np.ndarray | None:
    """A `Value` message stored inside the program as a float array; None when it is not of a float type."""
    tensor, stored = value.type.tensorType, value.immediateValue.tensor
    dtype = _FLOATS.get(tensor.dataType)
    if dtype is None or value.WhichOneof("value") != "immediateValue":
        return None
    shape = [d.constant.size for d in tensor.dimensions]
    if dtype is np.float16:
        return np.frombuffer(stored.bytes.values, dtype).reshape(shape)
    return np.array(stored.floats.values, dtype).reshape(shape)


class BlobWriter:
    """Collects tensors; equal ones are stored once."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = _ALIGNMENT
        self._known: dict[tuple[int, bytes], int] = {}

    def add(self, data: bytes, data_type: int, count: int) -> int:
        """Store `count` values of a MIL data type; returns the offset that the program refers to."""
        key = (data_type, hashlib.sha256(data).digest())
        if key in self._known:
            return self._known[key]
        code, bits = _STORED[data_type]
        padding_bits = 8 * len(data) - count * bits
        offset = self._size
        metadata = struct.pack("<IIQQQ", _SENTINEL, code, len(data), offset + _ALIGNMENT, padding_bits)
        self._append(metadata)
        self._append(data)
        self._known[key] = offset
        return offset

    def _append(self, data: bytes) -> None:
        padded = data + b"\0" * (-len(data) % _ALIGNMENT)
        self._parts.append(padded)
        self._size += len(padded)

    def content(self) -> bytes:
        """The whole file."""
        header = struct.pack("<II", len(self._known), 2)
        return header.ljust(_ALIGNMENT, b"\0") + b"".join(self._parts)


def value_of(writer: BlobWriter, array: np.ndarray, data_type: int) -> Any:
    """A `Value` message: in the file, or inside the program when it has fewer than ten elements.

    Values narrower than eight bits are packed. The border of ten elements is coremltools'.
    """
    _, bits = _STORED[data_type]
    data = packing.pack(array, bits) if bits < 8 else np.ascontiguousarray(array).tobytes()
    value = MIL_pb2.Value()
    _set_type(value.type, array.shape, data_type)
    if array.size < 10:
        _set_immediate(value.immediateValue.tensor, array, data, data_type)
        return value
    value.blobFileValue.fileName = FILE_NAME
    value.blobFileValue.offset = writer.add(data, data_type, array.size)
    return value


def _set_immediate(tensor: Any, array: np.ndarray, data: bytes, data_type: int) -> None:
    """float32 and int32 have fields of their own; Core ML reads every other type from raw bytes."""
    if data_type == MIL_pb2.FLOAT32:
        tensor.floats.values.extend(array.reshape(-1).tolist())
    elif data_type == MIL_pb2.INT32:
        tensor.ints.values.extend(array.reshape(-1).tolist())
    else:
        tensor.bytes.values = data


def _set_type(message: Any, shape: tuple[int, ...], data_type: int) -> None:
    message.tensorType.dataType = data_type
    message.tensorType.rank = len(shape)
    for size in shape:
        message.tensorType.dimensions.add().constant.size = size
