"""Reads the metadata buffers of a .tflite file with the flatbuffers library alone.

Field numbers are those of TFLite's schema, version 3: Model.buffers 4, Model.metadata 6, Metadata.name 0,
Metadata.buffer 1, Buffer.data 0.
"""

from __future__ import annotations

import struct
from pathlib import Path

from flatbuffers import number_types
from flatbuffers.table import Table

from edgecomp.errors import ArtifactError

MODEL_BUFFERS, _MODEL_METADATA = 4, 6
_METADATA_NAME, _METADATA_BUFFER = 0, 1
_BUFFER_DATA = 0


def metadata(path: Path) -> dict[str, bytes]:
    """Name -> bytes of every metadata buffer. Raises ArtifactError when the file is no TFLite model."""
    content = path.read_bytes()
    if len(content) < 16 or content[4:8] != b"TFL3":
        raise ArtifactError(
            f"{path} is not a TFLite model (no 'TFL3' at byte 4, {len(content)} bytes); "
            "export it again, or give another file"
        )
    try:
        return _metadata(content)
    except (struct.error, IndexError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged or cut short ({error}); export it again") from error


def _metadata(content: bytes) -> dict[str, bytes]:
    model = Table(content, struct.unpack_from("<I", content, 0)[0])
    buffers = tables(model, MODEL_BUFFERS)
    found = {}
    for entry in tables(model, _MODEL_METADATA):
        name = _bytes(entry, _METADATA_NAME).decode()
        offset = entry.Offset(4 + 2 * _METADATA_BUFFER)
        index = entry.Get(number_types.Uint32Flags, offset + entry.Pos) if offset else 0
        found[name] = _bytes(buffers[index], _BUFFER_DATA)
    return found


def tables(table: Table, field: int) -> list[Table]:
    """The tables of a vector field."""
    offset = table.Offset(4 + 2 * field)
    if not offset:
        return []
    start = table.Vector(offset)
    return [Table(table.Bytes, table.Indirect(start + 4 * i)) for i in range(table.VectorLen(offset))]


def length_of(table: Table, field: int) -> int:
    """Elements of a vector field; 0 where it is missing."""
    offset = table.Offset(4 + 2 * field)
    return int(table.VectorLen(offset)) if offset else 0


def _bytes(table: Table, field: int) -> bytes:
    offset = table.Offset(4 + 2 * field)
    if not offset:
        return b""
    start, length = table.Vector(offset), table.VectorLen(offset)
    if start + length > len(table.Bytes):
        raise IndexError(f"a vector of {length} bytes passes the end of the file")
    return bytes(table.Bytes[start : start + length])
