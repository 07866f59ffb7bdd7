"""The decoder with a cache of fixed room, as the formats of static shape (TFLite, Core ML) take it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from edgecomp.language.architecture import Architecture
from edgecomp.language.cache import CacheScales, Storage, packed, rounded, unpacked
from edgecomp.language.decoder import MASKED, Decoder, Pair

STATE_MASKED = -3e4
"""As MASKED, within float16, which is what states and scores have in Core ML."""


class CachedDecoder(nn.Module):
    """ids [1, T], position [1], then keys and values [1, kv heads, room, head] of every layer.

    Returns the logits [1, T, vocabulary] and the new keys and values [1, kv heads, T, head] of every layer,
    which the caller writes into its cache at `position`. Cache rows from `position` on are not looked at.
    A cache of int8 or int4 (two in a byte, [..., head / 2]) is int8 outside, and float inside one layer.
    """

    def __init__(
        self,
        decoder: Decoder,
        count: int,
        room: int,
        storage: Storage = "float32",
        scales: CacheScales | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.count, self.room, self.storage = count, room, storage
        places = torch.arange(room + count)
        self.rotations = [decoder.tables(i, places) for i in range(decoder.architecture.layers)]
        self.steps, self.places = torch.arange(count), torch.arange(room)
        self.scales = _by_layer(decoder.architecture, scales)

    def forward(self, ids: Tensor, position: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        decoder = self.decoder
        positions = self.steps + position
        x = decoder.embedded(ids)
        new: list[Tensor] = []
        for index, layer in enumerate(decoder.layers):
            cos, sin = (table[positions] for table in self.rotations[index])
            mask = self._mask(positions, position, decoder.architecture.window(index))
            old = (cache[2 * index], cache[2 * index + 1])
            if self.scales:
                rows: list[Tensor] = []
                x, _, _ = layer(x, cos, sin, mask, self._joined(index, old, rows))
                new += rows
            else:
                x, k, v = layer(x, cos, sin, mask, old)
                new += [k, v]
        return decoder.head(decoder.norm(x)), *new

    def _joined(self, index: int, old: Pair, rows: list[Tensor]) -> Callable[[Pair], Pair]:
        """What gives old and new keys and values of a layer restored; `rows` gets the new ones as stored."""

        def put(new: Pair) -> Pair:
            whole: list[Tensor] = []
            for before, value, scale in zip(old, new, self.scales[index], strict=True):
                integers = rounded(value, scale, self.storage)
                rows.append(packed(integers, self.storage))
                whole.append(torch.cat([unpacked(before, self.storage), integers], 2) * scale)
            return whole[0], whole[1]

        return put

    def _mask(self, positions: Tensor, position: Tensor, window: int) -> Tensor:
        """[T, room + T]: rows of the cache before `position`, then the new tokens up to each other."""
        old = positions[:, None] - self.places[None]
        seen_old = self.places[None] < position[:, None]
        new = self.steps[:, None] - self.steps[None]
        seen_new = new >= 0
        if window:
            seen_old, seen_new = seen_old & (old < window), seen_new & (new < window)
        both = torch.cat([seen_old.expand(self.count, self.room), seen_new], 1)
        return torch.where(both, 0.0, MASKED)


def example(a: Architecture, count: int, room: int, storage: Storage = "float32") -> tuple[Tensor, ...]:
    """Zeros of the shapes that `CachedDecoder.forward` takes."""
    width = a.head_width // 2 if storage == "int4" else a.head_width
    dtype = torch.float32 if storage == "float32" else torch.int8
    cache = [torch.zeros(1, a.kv_heads, room, width, dtype=dtype) for _ in range(2 * a.layers)]
    return torch.zeros(1, count, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), *cache


def _by_layer(a: Architecture, scales: CacheScales | None) -> list[Pair]:
    """Scales of keys and values [1, kv heads, 1, head] of every layer; none for a float cache."""
    if scales is None:
        return []
    shape = (1, a.kv_heads, 1, a.head_width)
    pairs = zip(scales.keys, scales.values, strict=True)
    return [(torch.from_numpy(k).reshape(shape), torch.from_numpy(v).reshape(shape)) for k, v in pairs]


class StatefulDecoder(nn.Module):
    """ids [1, T], position [1] -> logits [1, T, vocabulary]; the cache is kept in buffers, T rows a call.

    Buffers `key_N` and `value_N` [1, kv heads, room, head] are Core ML's states.
    """

    def __init__(self, decoder: Decoder, room: int, count: int = 1) -> None:
        super().__init__()
        a = decoder.architecture
        self.decoder, self.room, self.count = decoder, room, count
        self.steps = torch.arange(count)
        places = torch.arange(room + count - 1)
        self.rotations = [decoder.tables(i, places) for i in range(a.layers)]
        self.places = torch.arange(room)
        for index in range(a.layers):
            for part in ("key", "value"):
                self.register_buffer(f"{part}_{index}", torch.zeros(1, a.kv_heads, room, a.head_width))

    @property
    def states(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named_buffers() if name.startswith(("key_", "value_")))

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        decoder = self.decoder
        x = decoder.embedded(ids)
        positions = position if self.count == 1 else position + self.steps
        own = self.places - position
        here = ((own >= 0) & (own < self.count)).reshape(self.room, 1)
        rows = torch.clamp(own, 0, self.count - 1)
        for index, layer in enumerate(decoder.layers):
            cos, sin = (table[positions] for table in self.rotations[index])
            old = positions[:, None] - self.places[None]
            window = decoder.architecture.window(index)
            seen = (old >= 0) & (old < window) if window else old >= 0
            mask = torch.where(seen, 0.0, STATE_MASKED)
            x = self._layer(layer, index, x, cos, sin, mask, here, rows)
        return decoder.head(decoder.norm(x))

    def _layer(
        self,
        layer: nn.Module,
        index: int,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        here: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """The layer on the whole cache, its rows at `here` replaced first by those that `rows` names."""
        found: list[Tensor] = []

        def put(new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            for part, value in zip(("key", "value"), new, strict=True):
                state = getattr(self, f"{part}_{index}")
                spread = value if self.count == 1 else value[:, :, rows]
                state[:] = torch.where(here, spread, state)
                found.append(getattr(self, f"{part}_{index}"))
            return found[0], found[1]

        return layer(x, cos, sin, mask, put)[0]
