"""Decoders on Core ML's states, or on a cache of bytes that is ours: on the reference executor."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgecomp.errors import ArtifactError
from edgecomp.runtimes.coreml import CoreMLRuntime, ReferenceSession
from edgecomp.runtimes.decoder_room import check_room

_CACHE = ("key_", "value_")


class CoreMLDecoder:
    """An opened decoder. `position`: tokens in the cache; `room`: how many fit. One token a call."""

    def __init__(self, path: Path, room: int, threads: int = 1) -> None:
        session = CoreMLRuntime(device="reference").open(path, threads=threads)
        doors = [spec for spec in session.inputs if spec.name.startswith(_CACHE)]
        if not isinstance(session, ReferenceSession) or not (session.states or doors):
            raise ArtifactError(f"{path} has no states; write a decoder with `edgecomp export-decoder`")
        self._session = session
        self._cache = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in doors}
        self.room, self.position = room, 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of all states in float16, as Core ML keeps them, or of the arrays that come in."""
        states = sum(2 * state.size for state in self._session.states.values())
        return states + sum(array.nbytes for array in self._cache.values())

    def reset(self) -> None:
        self._session.reset_states()
        self.position = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits [n, vocabulary] of the next tokens `ids` [n]. Raises InputError when they do not fit."""
        check_room(self.position + len(ids), self.room)
        return np.stack([self._one(int(token)) for token in ids])

    def _one(self, token: int) -> np.ndarray:
        given = {"ids": np.full((1, 1), token, np.int32), "position": np.array([self.position], np.int32)}
        given |= self._cache
        logits, *rows = self._session.run([given[spec.name] for spec in self._session.inputs])
        for array, row in zip(self._cache.values(), rows, strict=True):
            array[:, :, self.position : self.position + 1] = row
        self.position += 1
        return np.asarray(logits, np.float32).reshape(-1)
