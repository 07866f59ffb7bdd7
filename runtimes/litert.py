"""TFLite artifacts on LiteRT, or on the interpreters of tflite-runtime and TensorFlow."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata as distributions
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgecomp import manifest
from edgecomp.errors import ArtifactError, DataError, InputError, MissingError
from edgecomp.runtimes import litert_file, litert_weights
from edgecomp.spec import OpPlacement, StoredWeight, TensorSpec

Backend = Literal["auto", "ai-edge-litert", "tflite-runtime", "tensorflow"]

# Distribution -> module of its interpreter, in order of preference (docs/decisions/tflite-lowering.md).
_MODULES = {
    "ai-edge-litert": "ai_edge_litert.interpreter",
    "tflite-runtime": "tflite_runtime.interpreter",
    "tensorflow": "tensorflow.lite.python.interpreter",
}
_CHECK_TIMEOUT_S = 600

# Kernel sets to try, by `optimize`. The reference set lacks a few operations (ELU, ROUND).
_RESOLVERS = {True: ("AUTO",), False: ("BUILTIN_REF", "BUILTIN_WITHOUT_DEFAULT_DELEGATES")}
_WITHOUT_DELEGATE = "BUILTIN_WITHOUT_DEFAULT_DELEGATES"
# The reference kernel of FULLY_CONNECTED takes block-wise 4-bit weights and gives zeros (LiteRT 2.3.0).
_NEVER_ON_REFERENCE = ("tflite-int4",)
_LARGEST_WITHOUT_DELEGATE = 16 << 20
"""Bytes of such a file that its plain kernel still runs in reasonable time: XNNPACK is 400 times as fast
(426 against 1.0 ms for 128 tokens times [576, 1536]; LiteRT 2.3.0, x86-64)."""

# Run by a fresh Python: a bad file can abort the process that opens it. stdout: the kernel set that has all
# operations; stderr: the error on one line.
_OPEN_IN_CHILD = """
import importlib, sys, warnings
import numpy as np
warnings.simplefilter("ignore")
module, path, *resolvers = sys.argv[1:]
library = importlib.import_module(module)

def open_and_run(resolver):
    kind = getattr(library.OpResolverType, resolver)
    interpreter = library.Interpreter(model_path=path, num_threads=1, experimental_op_resolver_type=kind)
    interpreter.allocate_tensors()
    for details in interpreter.get_input_details():
        interpreter.set_tensor(details["index"], np.zeros(details["shape"], details["dtype"]))
    interpreter.invoke()

for resolver in resolvers:
    try:
        open_and_run(resolver)
    except (RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())
        if resolver == resolvers[-1] or "Didn't find op" not in message:
            sys.exit(message)
    else:
        print(resolver)
        break
"""


@dataclass(frozen=True)
class LiteRTRuntime:
    """Opens .tflite files. `backend`: a distribution's name, or "auto" for the first that is installed.

    Raises MissingError when it (or, for "auto", any of them) is not installed.
    """

    backend: Backend = "auto"
    name: str = field(init=False)
    version: str = field(init=False)

    def __post_init__(self) -> None:
        if self.backend != "auto" and self.backend not in _MODULES:
            raise InputError(f"backend is {self.backend!r}; expected auto, {', '.join(_MODULES)}")
        wanted = list(_MODULES) if self.backend == "auto" else [self.backend]
        found = next((name for name in wanted if _version(name) is not None), None)
        if found is None:
            raise MissingError(
                f"no TFLite interpreter: {' or '.join(wanted)} is not installed; "
                "pip install 'edgecomp[tflite]'"
            )
        object.__setattr__(self, "name", found)
        object.__setattr__(self, "version", _version(found) or "")

    def open(self, path: Path, *, threads: int = 1, optimize: bool = True) -> LiteRTSession:
        """Open an artifact. `optimize=False`: reference kernels, no XNNPACK (but for a large tflite-int4).

        A file that this process has not opened yet is opened and run once in a child process first.
        Raises ArtifactError when it is missing, damaged, or makes the runtime abort.
        """
        if threads < 1:
            raise InputError(f"threads is {threads}; expected 1 or more")
        resolver = check_opens(path, backend=self.name, optimize=optimize)
        return LiteRTSession(path, self.name, threads, resolver)


def interpreter_module(distribution: str) -> str:
    """The module that holds the interpreter of an installed distribution."""
    return _MODULES[distribution]


def _version(distribution: str) -> str | None:
    names = (distribution, "tensorflow-cpu") if distribution == "tensorflow" else (distribution,)
    for name in names:
        try:
            return distributions.version(name)
        except distributions.PackageNotFoundError:
            continue
    return None


def check_opens(path: Path, *, backend: str = "ai-edge-litert", optimize: bool = True) -> str:
    """Open and run the file once, on zeros, in a child process; returns the name of the kernel set.

    Runtimes abort the process on some bad files (an infinite scale, a wrong operand count). Raises
    ArtifactError naming the signal or the runtime's message.
    """
    if not path.is_file():
        raise ArtifactError(f"no artifact at {path}; expected a .tflite file")
    target, facts = _embedded(path).get("target"), path.stat()
    resolvers = _RESOLVERS[optimize]
    if not optimize and target in _NEVER_ON_REFERENCE:
        large = facts.st_size > _LARGEST_WITHOUT_DELEGATE
        resolvers = _RESOLVERS[True] if large else (_WITHOUT_DELEGATE,)
    return _open_in_child(str(path.resolve()), facts.st_mtime_ns, facts.st_size, backend, resolvers)


@cache
def _open_in_child(path: str, modified_ns: int, size: int, backend: str, resolvers: tuple[str, ...]) -> str:
    """Once for each state of a file: `modified_ns` and `size` are part of the cache's key."""
    command = [sys.executable, "-c", _OPEN_IN_CHILD, _MODULES[backend], path, *resolvers]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ArtifactError(
            f"{path} did not finish one inference in {_CHECK_TIMEOUT_S} s with {backend}; try a smaller model"
        ) from error
    if done.returncode == 0:
        return done.stdout.split()[-1]
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith(("INFO:", "WARNING:"))]
    last = lines[-1] if lines else "no message"
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ArtifactError(f"{path} makes {backend} abort ({name}: {last}); it is damaged: export it again")
    raise ArtifactError(f"{backend} cannot run {path}: {last}; export it again, or update {backend}")


class LiteRTSession:
    """An opened .tflite file. Arrays go in and out as `inputs` and `outputs` say."""

    def __init__(self, path: Path, backend: str, threads: int, resolver: str) -> None:
        self._path, self._backend, self._threads, self._resolver = path, backend, threads, resolver
        self._interpreter = self._opened(resolver, preserve=False)
        self._inputs, self._outputs = self._specs()

    def _opened(self, resolver: str, *, preserve: bool) -> Any:
        library = importlib.import_module(_MODULES[self._backend])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            interpreter = library.Interpreter(
                model_path=str(self._path),
                num_threads=self._threads,
                experimental_op_resolver_type=getattr(library.OpResolverType, resolver),
                experimental_preserve_all_tensors=preserve,
            )
        interpreter.allocate_tensors()
        return interpreter

    def _specs(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Dtypes, shapes and scales from the file; names and layouts from what the exporter embedded."""
        facts = _embedded(self._path)
        sides = []
        for side, details in (
            ("inputs", self._interpreter.get_input_details()),
            ("outputs", self._interpreter.get_output_details()),
        ):
            known = facts.get(side, [])
            known = known if len(known) == len(details) else [{}] * len(details)
            sides.append(tuple(_spec(d, k) for d, k in zip(details, known, strict=True)))
        return sides[0], sides[1]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One inference. Raises DataError for arrays of another shape or dtype than `inputs` says."""
        return self._run(self._interpreter, arrays)

    def _run(self, interpreter: Any, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        if len(arrays) != len(self._inputs):
            raise DataError(f"{len(arrays)} arrays given; {self._path.name} has {len(self._inputs)} inputs")
        for array, spec, details in zip(arrays, self._inputs, interpreter.get_input_details(), strict=True):
            if tuple(array.shape) != spec.shape or array.dtype != np.dtype(spec.dtype):
                raise DataError(
                    f"input {spec.name!r} is {array.dtype}{list(array.shape)}; {self._path.name} takes "
                    f"{spec.dtype}{list(spec.shape)}: convert it with edgecomp.door.into"
                )
            interpreter.set_tensor(details["index"], array)
        try:
            interpreter.invoke()
        except RuntimeError as error:
            message = " ".join(str(error).split())
            raise ArtifactError(
                f"{self._path.name} failed while running on {self._backend}: {message}"
            ) from error
        return [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()]

    def stored_weights(self) -> list[StoredWeight]:
        """Every weight with the bits that it takes in the file."""
        return litert_weights.read(self._path)

    def placement(self) -> list[OpPlacement]:
        """Every operation of the file and where it runs: `XNNPACK`, `CPU` or `CPU reference`."""
        operations = _operations(self._interpreter)
        delegated = _delegated(operations)
        here = "CPU reference" if self._resolver == "BUILTIN_REF" else "CPU"
        tensors = {t["index"]: t for t in self._interpreter.get_tensor_details()}
        return [
            OpPlacement(
                name=_name(tensors, op),
                type=op["op_name"],
                placed_on="XNNPACK" if op["index"] in delegated else here,
                dtype=_dtype(tensors, op),
            )
            for op in operations
            if op["op_name"] != "DELEGATE"
        ]

    def tensors(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Run once and give every computed tensor as it is stored, by its name in the file.

        Names are `module/node`, and `module/node:part` for what is not a node's result. XNNPACK keeps no
        intermediate tensor, so an optimized session uses the optimized built-in kernels here.
        """
        return {d["name"]: a for d, a in self._intermediates(arrays)}

    def layers(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Run once and give every node's result in float32 and in torch's order, by graph node name.

        Nodes that the file computes inside another, or keeps with shuffled channels, are missing.
        """
        stored = litert_file.metadata(self._path).get(manifest.KEY + "_layout", b"{}")
        layouts = json.loads(stored)
        found = {}
        for details, array in self._intermediates(arrays):
            name = details["name"]
            node = name.rpartition("/")[2]
            if ":" not in node and layouts.get(name) != []:
                found[node] = _in_torch_order(_real(array, details), layouts.get(name))
        return found

    def _intermediates(self, arrays: Sequence[np.ndarray]) -> list[tuple[dict[str, Any], np.ndarray]]:
        resolver = _WITHOUT_DELEGATE if self._resolver == "AUTO" else self._resolver
        interpreter = self._opened(resolver, preserve=True)
        self._run(interpreter, arrays)
        computed = {i for op in _operations(interpreter) for i in op["outputs"]}
        return [
            (d, interpreter.get_tensor(d["index"]))
            for d in interpreter.get_tensor_details()
            if d["index"] in computed
        ]


def _embedded(path: Path) -> Mapping[str, Any]:
    """What the exporter wrote into the file, or nothing for a file of another tool."""
    stored = litert_file.metadata(path).get(manifest.KEY)
    if stored is None:
        return {}
    try:
        facts = json.loads(stored)
    except ValueError as error:
        raise ArtifactError(f"{path} has damaged metadata ({error}); export it again") from error
    return facts if isinstance(facts, dict) else {}


def _spec(details: Mapping[str, Any], known: Mapping[str, Any]) -> TensorSpec:
    scales = details["quantization_parameters"]["scales"]
    zero_points = details["quantization_parameters"]["zero_points"]
    return TensorSpec(
        known.get("name", details["name"]),
        tuple(int(d) for d in details["shape"]),
        np.dtype(details["dtype"]).name,
        known.get("layout", ""),
        float(scales[0]) if len(scales) == 1 else None,
        int(zero_points[0]) if len(scales) == 1 else None,
    )


def _operations(interpreter: Any) -> list[dict[str, Any]]:
    return list(interpreter._get_ops_details())


def _delegated(operations: Sequence[Mapping[str, Any]]) -> set[int]:
    """Indices of the operations that a delegate took over: those between its inputs and its outputs."""
    producer = {int(t): op for op in operations if op["op_name"] != "DELEGATE" for t in op["outputs"]}
    taken: set[int] = set()
    for delegate in (op for op in operations if op["op_name"] == "DELEGATE"):
        borders = {int(t) for t in delegate["inputs"]}
        waiting = [int(t) for t in delegate["outputs"]]
        while waiting:
            tensor = waiting.pop()
            op = producer.get(tensor)
            if op is None or tensor in borders or op["index"] in taken:
                continue
            taken.add(op["index"])
            waiting.extend(int(t) for t in op["inputs"])
    return taken


def _name(tensors: Mapping[int, Any], op: Mapping[str, Any]) -> str:
    first = int(op["outputs"][0])
    return str(tensors[first]["name"]) if first in tensors else ""


def _dtype(tensors: Mapping[int, Any], op: Mapping[str, Any]) -> str:
    first = int(op["outputs"][0])
    return np.dtype(tensors[first]["dtype"]).name if first in tensors else ""


def _real(array: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    quantization = details["quantization_parameters"]
    if len(quantization["scales"]) != 1:
        return array
    return (array.astype(np.float32) - np.float32(quantization["zero_points"][0])) * quantization["scales"][0]


def _in_torch_order(array: np.ndarray, perm: Sequence[int] | None) -> np.ndarray:
    return array if perm is None else array.transpose(np.argsort(perm))
