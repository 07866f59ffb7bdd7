"""Decoders on ONNX Runtime: a buffer for each layer's keys and values, appended to in place."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgecomp.errors import ArtifactError
from edgecomp.runtimes.decoder_room import check_room
from edgecomp.runtimes.onnxruntime import options

_CHUNK = 256
"""Tokens of a prompt that are run at once: the logits of more would be large."""
_TYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}


class OnnxDecoder:
    """An opened decoder. `position`: tokens in the cache; `room`: how many fit."""

    def __init__(self, path: Path, room: int, threads: int = 1) -> None:
        if not path.is_file():
            raise ArtifactError(f"no artifact at {path}; expected an .onnx file")
        try:
            self._session = ort.InferenceSession(
                str(path), options(threads, True), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises many unrelated classes from its C++ side
            first = " ".join(str(error).split())[:300]
            raise ArtifactError(f"ONNX Runtime {ort.__version__} cannot open {path}: {first}") from error
        doors = [i for i in self._session.get_inputs() if i.name.startswith("past_key_values.")]
        if not doors:
            raise ArtifactError(f"{path} has no past_key_values; export it with `edgecomp export-decoder`")
        self.room, self.position = room, 0
        self._cache = {
            i.name: ort.OrtValue.ortvalue_from_numpy(
                np.zeros((1, i.shape[1], room, i.shape[3]), _TYPES[i.type])
            )
            for i in doors
        }

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values at full room."""
        arrays = (v.numpy() for v in self._cache.values())
        return sum(math.prod(a.shape) * a.itemsize for a in arrays)

    def reset(self) -> None:
        self.position = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits [n, vocabulary] of the next tokens `ids` [n] int64. Raises InputError for too many."""
        check_room(self.position + len(ids), self.room)
        parts = [self._run(ids[i : i + _CHUNK]) for i in range(0, len(ids), _CHUNK)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run(self, ids: np.ndarray) -> np.ndarray:
        binding = self._session.io_binding()
        total = self.position + len(ids)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, np.int64)[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        for name, buffer in self._cache.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        self.position = total
        logits = next(v for v, o in zip(binding.get_outputs(), self._order(), strict=True) if o == "logits")
        return logits.numpy()[0]

    def _order(self) -> list[str]:
        """Outputs come back in the order in which they were bound."""
        return [*(n.replace("past_key_values", "present") for n in self._cache), "logits"]
