"""Opens `.mlpackage` artifacts: Core ML itself on a Mac, a reference executor everywhere else.

The reference executor reads the package's protobuf and weights itself, decodes compressed weights bit for
bit and runs the MIL program with torch on the CPU. It shows what the artifact computes, not how fast.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from edgecomp.errors import DataError
from edgecomp.runtimes import coreml_apple, coreml_kernels, coreml_package, coreml_weights
from edgecomp.runtimes.coreml_package import Operation, Package
from edgecomp.runtimes.coreml_program import Program
from edgecomp.runtimes.coreml_proto import VERSION
from edgecomp.spec import OpPlacement, Session, StoredWeight, TensorSpec

Precision = Literal["float16", "float32"]


@dataclass(frozen=True)
class CoreMLRuntime:
    """`precision` is that of the reference executor: `float16` rounds what the program types float16 after
    every operation; `float32` runs the same graph exactly. `device` picks the executor by name: Core ML
    (`apple`), the reference (`reference`), or what this machine has (None).
    """

    precision: Precision = "float16"
    device: Literal["apple", "reference"] | None = None
    name: str = "coreml"
    version: str = VERSION

    def __post_init__(self) -> None:
        if self.precision not in ("float16", "float32"):
            raise ValueError(f"precision is {self.precision!r}; expected 'float16' or 'float32'")

    def open(self, path: Path, *, threads: int = 1, optimize: bool = True) -> Session:
        """Open a package. `optimize=False`: the reference executor in float32, on a Mac too.

        Raises ArtifactError when the package is damaged or holds operations that the executor lacks.
        """
        device = self.device or ("apple" if sys.platform == "darwin" else "reference")
        if device == "apple" and optimize:
            return coreml_apple.AppleSession(coreml_package.read(Path(path)))
        rounds = optimize and self.precision == "float16"
        return ReferenceSession(coreml_package.read(Path(path)), rounds=rounds, threads=threads)


class ReferenceSession:
    """An opened package, run with torch. States keep their values from one `run` to the next."""

    def __init__(self, package: Package, *, rounds: bool, threads: int) -> None:
        self.package = package
        self._program = Program(package, rounds=rounds)
        self._threads = threads

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.package.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.package.outputs

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Arrays go in and out as `inputs` and `outputs` say. Raises DataError when they do not fit."""
        values = self._execute(arrays, keep=False)
        return [values[o.name].numpy().astype(o.dtype) for o in self.outputs]

    def tensors(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Every value that the program computes, by its name in the program (inputs and outputs too)."""
        values = self._execute(arrays, keep=True)
        return {name: v.numpy() for name, v in values.items() if isinstance(v, torch.Tensor)}

    def weight(self, name: str) -> np.ndarray:
        """A constant of the program, decoded. Raises KeyError."""
        return np.asarray(self._program.constant(name))

    def stored_weights(self) -> list[StoredWeight]:
        """Every weight with the bits that it takes in the file."""
        return coreml_weights.read(self.package)

    def placement(self) -> list[OpPlacement]:
        """Every operation with the type of its first output; compressed weights with the type stored."""
        return [_placed(o) for o in self.package.main.walk() if o.type != "const"]

    def realized(self) -> list[OpPlacement]:
        """One row for each weight that an operation of the program uses, by the form in which it is stored.

        `name` is `conv 32x3x3x3 #1`: the operation, the weight's shape, and a count of its like.
        """
        return coreml_kernels.weights(self.package.main)

    def weighted(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Run once and give what each operation with a weight gives, under the names of `realized`."""
        values = self.tensors(arrays)
        names = coreml_kernels.results(self.package.main)
        return {label: values[name] for label, name in names.items() if name in values}

    @property
    def states(self) -> dict[str, np.ndarray]:
        """Current values of the states, by name."""
        return {name: tensor.numpy().copy() for name, tensor in self._program.states.items()}

    def reset_states(self) -> None:
        """Set every state to zeros, as a new Core ML state is."""
        self._program.reset_states()

    def share_states(self, other: ReferenceSession) -> None:
        """Keep the states of another function of the same model from now on."""
        self._program.share_states(other._program)

    def _execute(self, arrays: Sequence[np.ndarray], *, keep: bool) -> dict[str, torch.Tensor]:
        if len(arrays) != len(self.inputs):
            raise DataError(f"{len(arrays)} arrays given; {self.package.path} takes {len(self.inputs)}")
        given = {}
        for array, spec in zip(arrays, self.inputs, strict=True):
            if tuple(array.shape) != spec.shape:
                raise DataError(
                    f"input {spec.name!r} has shape {array.shape}; the artifact expects {spec.shape}"
                )
            given[spec.name] = torch.from_numpy(np.array(array, dtype=spec.dtype))
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return self._program.run(given, keep=keep)
        finally:
            torch.set_num_threads(before)


def _placed(operation: Operation) -> OpPlacement:
    dtype = operation.outputs[0][1].dtype if operation.outputs else ""
    return OpPlacement(operation.name, operation.type, "reference", operation.stored or dtype)
