"""The key-value cache: its storage, its bytes, and scales where it is kept in few bits.

Keys have channels that are large in every token, so a scale for each channel serves them (Liu et al., "KIVI",
ICML 2024, section 3); ONNX Runtime's attention takes the same kind of scale for values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from edgecomp.errors import DataError, InputError
from edgecomp.language.architecture import Architecture
from edgecomp.language.decoder import Decoder, causal

Storage = Literal["float32", "int8", "int4"]
Activations = Literal["int8", "float"]
"""How 4-bit weights are multiplied: with activations rounded at run time, or left float."""
BITS = {"float32": 32, "int8": 8, "int4": 4}


@dataclass(frozen=True, eq=False)
class CacheScales:
    """For every layer the scales of keys and of values, float32 [kv heads * head]."""

    keys: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]


def check_storage(storage: str) -> None:
    if storage not in BITS:
        raise InputError(f"cache is {storage!r}; expected one of {', '.join(BITS)}")


def bytes_for(a: Architecture, tokens: int, storage: Storage) -> int:
    """Bytes of the cache for this many tokens, scales included."""
    values = 2 * a.layers * a.kv_heads * a.head_width
    scales = 0 if storage == "float32" else 4 * values
    return values * tokens * BITS[storage] // 8 + scales


def rounded(x: Tensor, scale: Tensor, storage: Storage) -> Tensor:
    """Integers, as floats, of keys or values on the scales of their channels."""
    limit = largest(storage)
    return torch.clamp(torch.round(x * (1.0 / scale)), -limit, limit)


def packed(integers: Tensor, storage: Storage) -> Tensor:
    """Integers [..., head] -> int8 [..., head], or two in each byte [..., head / 2]: left + 16 right."""
    if storage == "int4":
        half = integers.shape[-1] // 2
        integers = integers[..., :half] + 16.0 * integers[..., half:]
    return integers.to(torch.int8)


def unpacked(stored: Tensor, storage: Storage) -> Tensor:
    """What `packed` gave, as integers in float32: 4-bit ones are -7 to 7, so rounding takes them apart."""
    found = stored.to(torch.float32)
    if storage != "int4":
        return found
    right = torch.round(found * (1 / 16))
    return torch.cat([found - 16.0 * right, right], -1)


def largest(storage: Storage) -> int:
    """127 for int8, 7 for int4."""
    return (1 << (BITS[storage] - 1)) - 1


def check_scales(storage: Storage, scales: CacheScales | None) -> None:
    """Raise InputError for a cache of few bits without scales."""
    if storage != "float32" and scales is None:
        raise InputError(f"a cache of {storage} needs scales; give calibration text")


@torch.no_grad()
def scales_from(decoder: Decoder, samples: Iterable[Tensor], storage: Storage) -> CacheScales | None:
    """Scales by the largest key (pair) and value of every channel over the samples (ids [1, T]).

    None for float32. Raises DataError without samples.
    """
    if storage == "float32":
        return None
    a = decoder.architecture
    highest = torch.zeros(2, a.layers, a.kv_heads, a.head_width)
    seen = 0
    for ids in samples:
        seen += 1
        _observe(decoder, ids, highest)
    if not seen:
        raise DataError(f"a cache of {storage} needs calibration text for its scales; give --calib")
    found = highest.clamp(min=1e-6).reshape(2, a.layers, -1).numpy() / largest(storage)
    return CacheScales(tuple(found[0]), tuple(found[1]))


def _observe(decoder: Decoder, ids: Tensor, highest: Tensor) -> None:
    x = decoder.embedded(ids)
    positions = torch.arange(ids.shape[1])
    for index, layer in enumerate(decoder.layers):
        cos, sin = decoder.tables(index, positions)
        x, *new = layer(x, cos, sin, causal(len(positions), decoder.architecture.window(index)))
        for which, value in enumerate((_lengths(new[0]), new[1].abs())):
            highest[which, index] = torch.maximum(highest[which, index], value[0].amax(1))


def _lengths(keys: Tensor) -> Tensor:
    """How large each channel of rotated keys [..., head] can become at any position: the length of its pair.

    A channel that is small at the positions of the calibration text is large where the rotation has turned.
    """
    half = keys.shape[-1] // 2
    length = torch.hypot(keys[..., :half], keys[..., half:])
    return torch.cat([length, length], -1)
