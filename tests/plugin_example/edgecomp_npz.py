"""A third-party exporter and runtime: the float graph's weights and outputs in an .npz file.

One file and two entry points; edgecomp knows nothing of it. The runtime recomputes a linear classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgecomp import files, manifest
from edgecomp.spec import Artifact, Candidate, Data, OpPlacement, Problem, TensorSpec


@dataclass(frozen=True)
class NpzExporter:
    """Writes `weight` and `bias` of a model that is one linear layer, times `gain`."""

    target: str = "npz-linear"
    gain: float = 1.0

    def problems(self, candidate: Candidate) -> list[Problem]:
        names = [type(m).__name__ for m in candidate.module.modules() if not list(m.children())]
        return [Problem(n, "", "only Linear is known") for n in names if n != "Linear"]

    def export(self, candidate: Candidate, data: Data, out: Path) -> Artifact:
        state = candidate.module.state_dict()
        weight, bias = (
            next(t for n, t in state.items() if n.endswith(e)).numpy() for e in ("weight", "bias")
        )
        outputs = [TensorSpec("output", (1, len(bias)))]
        draft = manifest.draft(
            candidate, data, path=out, target=self.target, inputs=candidate.inputs, outputs=outputs
        )
        with files.atomic(out) as temporary:
            with temporary.open("wb") as stream:
                np.savez(stream, weight=weight * self.gain, bias=bias * self.gain)
            return manifest.describe(draft, temporary)


class NpzSession:
    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as archive:
            self.weight, self.bias = archive["weight"], archive["bias"]
        self.inputs = (TensorSpec("x", (1, self.weight.shape[1])),)
        self.outputs = (TensorSpec("output", (1, self.weight.shape[0])),)

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [(arrays[0] @ self.weight.T + self.bias).astype(np.float32)]

    def placement(self) -> list[OpPlacement]:
        return [OpPlacement("linear", "Linear", "NumPy")]


class NpzRuntime:
    name = "numpy"
    version = np.__version__

    def open(self, path: Path, *, threads: int = 1, optimize: bool = True) -> NpzSession:
        return NpzSession(path)
