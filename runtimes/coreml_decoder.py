"""Decoders on Core ML's states, or on a cache of bytes that is ours: on the reference executor."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from edgecomp.errors import ArtifactError
from edgecomp.runtimes import coreml_package
from edgecomp.runtimes.coreml import ReferenceSession
from edgecomp.runtimes.decoder_room import check_room

_CACHE = ("key_", "value_")


class CoreMLDecoder:
    """An opened decoder. `position`: tokens in the cache; `room`: how many fit."""

    def __init__(self, path: Path, room: int, threads: int = 1) -> None:
        package = coreml_package.read(path)
        doors = [spec for spec in package.inputs if spec.name.startswith(_CACHE)]
        if not (package.states or doors):
            raise ArtifactError(f"{path} has no states; write a decoder with `edgecomp export-decoder`")
        self._path, self._threads = path, threads
        self._functions = package.functions
        self._session = ReferenceSession(package, rounds=True, threads=threads)
        self._cache = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in doors}
        self.room, self.position = room, 0

    @cached_property
    def _prefill(self) -> ReferenceSession | None:
        """The function that reads a chunk at once, opened when the first prompt is long enough."""
        if "prefill" not in self._functions:
            return None
        package = coreml_package.read(self._path, "prefill")
        session = ReferenceSession(package, rounds=True, threads=self._threads)
        session.share_states(self._session)
        return session

    @property
    def cache_bytes(self) -> int:
        """Bytes of all states in float16, as Core ML keeps them, or of the arrays that come in."""
        states = sum(2 * state.size for state in self._session.states.values())
        return states + sum(array.nbytes for array in self._cache.values())

    def reset(self) -> None:
        self._session.reset_states()
        self.position = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits [n, vocabulary] of the next tokens `ids` [n]. Raises InputError when they do not fit.

        Whole chunks are run at once, the rest one by one.
        """
        check_room(self.position + len(ids), self.room)
        parts, done = [], 0
        while done < len(ids):
            session = self._for(len(ids) - done)
            count = session.inputs[0].shape[1]
            parts.append(self._run(session, ids[done : done + count]))
            done += count
        return np.concatenate(parts)

    def _for(self, left: int) -> ReferenceSession:
        chunk = self._prefill.inputs[0].shape[1] if left > 1 and self._prefill else left + 1
        return self._prefill if self._prefill and left >= chunk else self._session

    def _run(self, session: ReferenceSession, ids: np.ndarray) -> np.ndarray:
        given = {"ids": ids[None].astype(np.int32), "position": np.array([self.position], np.int32)}
        given |= self._cache
        logits, *rows = session.run([given[spec.name] for spec in session.inputs])
        end = self.position + len(ids)
        for array, row in zip(self._cache.values(), rows, strict=True):
            array[:, :, self.position : end] = row
        self.position = end
        return np.asarray(logits, np.float32).reshape(len(ids), -1)
