"""Decoders on LiteRT: the cache is ours, NumPy arrays that the new rows of every step are written into."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp.errors import ArtifactError
from edgecomp.runtimes.decoder_room import check_room
from edgecomp.runtimes.litert import LiteRTRuntime, interpreter_module


class LiteRTDecoder:
    """An opened decoder. `position`: tokens in the cache; `room`: how many fit."""

    def __init__(self, path: Path, room: int, threads: int = 1) -> None:
        if not path.is_file():
            raise ArtifactError(f"no artifact at {path}; expected a .tflite file")
        library = importlib.import_module(interpreter_module(LiteRTRuntime().name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._interpreter = library.Interpreter(model_path=str(path), num_threads=threads)
                self._runners = {k: self._interpreter.get_signature_runner(k) for k in ("prefill", "decode")}
            except (ValueError, RuntimeError, KeyError) as error:
                raise ArtifactError(
                    f"{path} is no decoder with signatures prefill and decode ({error}); write one with "
                    "`edgecomp export-decoder`"
                ) from error
        self.room, self.position = room, 0
        details = self._runners["prefill"].get_input_details()
        self._chunk = int(details["ids"]["shape"][1])
        self._dtypes = {name: details[name]["dtype"] for name in ("ids", "position")}
        self._cache = {
            name: np.zeros(tuple(found["shape"]), found["dtype"])
            for name, found in details.items()
            if name.startswith(("key_", "value_"))
        }

    @property
    def cache_bytes(self) -> int:
        return sum(array.nbytes for array in self._cache.values())

    def reset(self) -> None:
        self.position = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits [n, vocabulary] of the next tokens `ids` [n]. Raises InputError when they do not fit.

        Whole chunks are run at once, the rest one by one.
        """
        check_room(self.position + len(ids), self.room)
        parts, done = [], 0
        while done < len(ids):
            count = self._chunk if len(ids) - done >= self._chunk else 1
            parts.append(self._run(ids[done : done + count]))
            done += count
        return np.concatenate(parts)

    def _run(self, ids: np.ndarray) -> np.ndarray:
        runner: Any = self._runners["decode" if len(ids) == 1 and self._chunk != 1 else "prefill"]
        found = runner(
            ids=ids[None].astype(self._dtypes["ids"]),
            position=np.array([self.position], self._dtypes["position"]),
            **self._cache,
        )
        end = self.position + len(ids)
        for name, array in self._cache.items():
            array[:, :, self.position : end] = found[f"new_{name}"]
        self.position = end
        return np.array(found["logits"])[0]
