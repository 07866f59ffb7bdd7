"""Integers of fewer than eight bits, packed without gaps.

The stream is little-endian in bits: value `i` occupies bits `[i * bits, (i + 1) * bits)`, bit 0 being the
least significant bit of byte 0. Four-bit values therefore sit low nibble first, and three- and six-bit
values cross byte borders. This is the order of Core ML's `weight.bin` (MILBlob storage format, version 2)
and of the INT4 tensors of TFLite and ONNX.
"""

from __future__ import annotations

import numpy as np

WIDTHS = (1, 2, 3, 4, 6, 8)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take; the last byte is padded with zero bits."""
    return (count * bits + 7) // 8


def pack(values: np.ndarray, bits: int) -> bytes:
    """Pack integers in [0, 2^bits) (or two's complement in [-2^(bits-1), 2^(bits-1))), in C order.

    `pack([1, 2, 3], 4)` gives bytes 0x21, 0x03. Raises ValueError when `bits` is not 1, 2, 3, 4, 6 or 8, or
    when a value does not fit.
    """
    _check_width(bits)
    flat = np.asarray(values).reshape(-1).astype(np.int64)
    if flat.size and (flat.min() < -(1 << (bits - 1)) or flat.max() >= (1 << bits)):
        raise ValueError(f"values span [{flat.min()}, {flat.max()}]; {bits} bits hold [0, {(1 << bits) - 1}]")
    stored = (flat & ((1 << bits) - 1)).astype(np.uint8)
    if bits == 8:
        return stored.tobytes()
    spread = np.unpackbits(stored[:, None], axis=1, bitorder="little", count=bits)
    return np.packbits(spread.reshape(-1), bitorder="little").tobytes()


def unpack(data: bytes | np.ndarray, bits: int, count: int, *, signed: bool = False) -> np.ndarray:
    """The inverse of `pack`: `count` values, shape [count], uint8 (int8 when `signed`).

    Raises ValueError when the bytes are too few.
    """
    _check_width(bits)
    stream = (
        np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.asarray(data, np.uint8).reshape(-1)
    )
    needed = packed_bytes(count, bits)
    if stream.size < needed:
        raise ValueError(f"{count} values of {bits} bits need {needed} bytes; got {stream.size}")
    if bits == 8:
        found = stream[:count].copy()
    else:
        spread = np.unpackbits(stream[:needed], bitorder="little", count=count * bits).reshape(count, bits)
        found = np.packbits(spread, axis=1, bitorder="little").reshape(-1)
    if not signed:
        return found
    shift = 8 - bits
    return (found << shift).astype(np.uint8).view(np.int8) >> shift


def _check_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"bits is {bits}; expected one of {', '.join(map(str, WIDTHS))}")
