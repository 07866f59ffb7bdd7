"""The decoder with a cache of fixed room, as the formats of static shape (TFLite, Core ML) take it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgecomp.language.decoder import MASKED, Decoder


class CachedDecoder(nn.Module):
    """ids [1, T], position [1], then keys and values [1, kv heads, room, head] of every layer.

    Returns the logits [1, T, vocabulary] and the new keys and values [1, kv heads, T, head] of every layer,
    which the caller writes into its cache at `position`. Cache rows from `position` on are not looked at.
    """

    def __init__(self, decoder: Decoder, count: int, room: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.count, self.room = count, room
        places = torch.arange(room + count)
        self.rotations = [decoder.tables(i, places) for i in range(decoder.architecture.layers)]
        self.steps, self.places = torch.arange(count), torch.arange(room)

    def forward(self, ids: Tensor, position: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        decoder = self.decoder
        positions = self.steps + position
        x = decoder.embedded(ids)
        new: list[Tensor] = []
        for index, layer in enumerate(decoder.layers):
            cos, sin = (table[positions] for table in self.rotations[index])
            mask = self._mask(positions, position, decoder.architecture.window(index))
            x, k, v = layer(x, cos, sin, mask, (cache[2 * index], cache[2 * index + 1]))
            new += [k, v]
        return decoder.head(decoder.norm(x)), *new

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
