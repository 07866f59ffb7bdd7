"""ONNX artifacts on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from edgecomp import manifest
from edgecomp.errors import ArtifactError, DataError, InputError
from edgecomp.runtimes import onnxruntime_kernels, onnxruntime_weights
from edgecomp.runtimes.child import Opener
from edgecomp.spec import OpPlacement, StoredWeight, TensorSpec

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
_ERRORS_ONLY = 3
_KEEP_SIGNED = "session.qdqisint8allowed"
_SIGNED = "output_dtype INT8 does not match y_zero_point type UINT8"
"""What ONNX Runtime 1.31 says where its optimizer moved an int8 QuantizeLinear of opset 21 before a Gemm and
then made its zero point unsigned, but not its `output_dtype`. Left signed, the file opens."""
_LARGEST_RUN = 64 << 20
"""Bytes of a file that is also run once in the child; a larger one is only opened there."""

# Run by a fresh Python. An error is left to the process that asked, which meets it too.
_OPEN_IN_CHILD = """
import json, sys
import numpy as np
import onnxruntime as ort

TYPES = {"float": "float32", "double": "float64"}

def zeros(door):
    shape = [d if isinstance(d, int) and d > 0 else 1 for d in door.shape]
    name = door.type.removeprefix("tensor(").removesuffix(")")
    return np.zeros(shape, TYPES.get(name, name))

def open_and_run(path, providers, optimize, run, **_):
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=providers)
    if run:
        session.run(None, {door.name: zeros(door) for door in session.get_inputs()})

for line in sys.stdin:
    try:
        open_and_run(**json.loads(line))
    except Exception:
        pass
    print(flush=True)
"""
_OPENER = Opener(_OPEN_IN_CHILD, f"ONNX Runtime {ort.__version__}")


@dataclass(frozen=True)
class OnnxRuntime:
    """Opens .onnx files. `providers`: execution providers in order of preference."""

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    name: str = field(default="onnxruntime", init=False)
    version: str = field(default=ort.__version__, init=False)

    def __post_init__(self) -> None:
        known = ort.get_available_providers()
        missing = [p for p in self.providers if p not in known]
        if missing:
            raise InputError(
                f"execution provider {missing[0]!r} is not in this ONNX Runtime; it has {', '.join(known)}"
            )

    def open(self, path: Path, *, threads: int = 1, optimize: bool = True) -> OnnxSession:
        """Open an artifact. `optimize=False`: the graph as written, QDQ computed in float.

        That is the arithmetic of Arm and of x86 with VNNI; optimized 8-bit kernels of an x86 without VNNI
        saturate. A file that this process has not opened yet is opened and run once in a child process first.
        Raises ArtifactError when the file is missing, damaged, or makes the runtime abort.
        """
        if threads < 1:
            raise InputError(f"threads is {threads}; expected 1 or more")
        if not path.is_file():
            raise ArtifactError(f"no artifact at {path}; expected an .onnx file")
        self._try(path, optimize)
        return OnnxSession(path, self.providers, options(threads, optimize))

    def _try(self, path: Path, optimize: bool) -> None:
        facts = path.stat()
        _OPENER.check(
            str(path.resolve()), providers=list(self.providers), optimize=optimize,
            run=facts.st_size <= _LARGEST_RUN, modified_ns=facts.st_mtime_ns, size=facts.st_size,
        )  # fmt: skip


def options(threads: int, optimize: bool) -> ort.SessionOptions:
    """Session options: own threads, no spinning, errors only."""
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    chosen.log_severity_level = _ERRORS_ONLY
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    level = ort.GraphOptimizationLevel
    chosen.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    return chosen


class OnnxSession:
    """An opened .onnx file. Arrays go in and out as `inputs` and `outputs` say."""

    def __init__(self, path: Path, providers: Sequence[str], chosen: ort.SessionOptions) -> None:
        self._path = path
        self._providers = list(providers)
        self._options = chosen
        self._session = _open(path, chosen, providers)
        known = _manifest_specs(path)
        self._inputs = tuple(_spec(i, known) for i in self._session.get_inputs())
        self._outputs = tuple(_spec(o, known) for o in self._session.get_outputs())

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Raises DataError when ONNX Runtime refuses the arrays' number, shape or dtype."""
        feed = _feed(self._inputs, arrays)
        return [np.asarray(r) for r in self._session.run(None, feed)]

    def tensors(self, arrays: Sequence[np.ndarray]) -> Mapping[str, np.ndarray]:
        """Every float value by its name in the file, which is the graph node's; the graph as written."""
        names = [o.name for o in self._exposed.get_outputs()]
        results = self._exposed.run(names, _feed(self._inputs, arrays))
        return dict(zip(names, (np.asarray(r) for r in results), strict=True))

    @cached_property
    def _exposed(self) -> ort.InferenceSession:
        """The same graph with every intermediate value as an output, optimizations off."""
        model = onnx.shape_inference.infer_shapes(onnx.load(str(self._path)))
        known = {v.name: v for v in (*model.graph.value_info, *model.graph.output)}
        del model.graph.output[:]
        model.graph.output.extend(v for name, v in known.items() if _is_float(v))
        return _open(model.SerializeToString(), options(1, optimize=False), self._providers)

    def stored_weights(self) -> list[StoredWeight]:
        """Every weight with the bits that it takes in the file."""
        return onnxruntime_weights.read(self._path)

    def realized(self) -> list[OpPlacement]:
        """Operations of the file as they really run: after fusion, with this session's options."""
        chosen = options(self._options.intra_op_num_threads, self._optimized)
        return onnxruntime_kernels.kernels(self._path, chosen, self._providers, _open)

    @property
    def _optimized(self) -> bool:
        return bool(self._options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL)

    def placement(self) -> list[OpPlacement]:
        """Operations of the file with the dtype that each computes in, before fusion."""
        model = onnx.shape_inference.infer_shapes(onnx.load(str(self._path)))
        types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
        provider = self._session.get_providers()[0].removesuffix("ExecutionProvider")
        return [
            OpPlacement(n.output[0], n.op_type, provider, _dtype(types.get(n.output[0], 0)))
            for n in model.graph.node
        ]


def _open(
    model: Path | bytes, chosen: ort.SessionOptions, providers: Sequence[str], signed: bool = False
) -> ort.InferenceSession:
    """`signed`: int8 is kept as it is, as it was asked for after a first failure."""
    source = str(model) if isinstance(model, Path) else model
    try:
        return ort.InferenceSession(source, chosen, providers=list(providers))
    except Exception as error:  # ONNX Runtime raises many unrelated classes from its C++ side
        if _SIGNED in str(error) and not signed:
            chosen.add_session_config_entry(_KEEP_SIGNED, "1")
            return _open(model, chosen, providers, signed=True)
        first = " ".join(str(error).split())[:300]
        label = model if isinstance(model, Path) else "the exposed graph"
        raise ArtifactError(f"ONNX Runtime {ort.__version__} cannot open {label}: {first}") from error


def _feed(specs: Sequence[TensorSpec], arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    if len(arrays) != len(specs):
        raise DataError(f"{len(arrays)} arrays given; the artifact takes {[s.name for s in specs]}")
    for spec, array in zip(specs, arrays, strict=True):
        if tuple(array.shape) != spec.shape or str(array.dtype) != spec.dtype:
            raise DataError(
                f"input {spec.name!r} is {array.dtype}{list(array.shape)}; the artifact takes "
                f"{spec.dtype}{list(spec.shape)}"
            )
    return {s.name: a for s, a in zip(specs, arrays, strict=True)}


def _manifest_specs(path: Path) -> dict[str, TensorSpec]:
    if not manifest.path_of(path).exists():
        return {}
    artifact = manifest.read(path)
    return {s.name: s for s in (*artifact.inputs, *artifact.outputs)}


def _spec(found: ort.NodeArg, known: Mapping[str, TensorSpec]) -> TensorSpec:
    if found.name in known:
        return known[found.name]
    shape = tuple(d if isinstance(d, int) and d > 0 else 1 for d in found.shape)
    return TensorSpec(found.name, shape, _DTYPES.get(found.type, "float32"))


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def _dtype(element: int) -> str:
    return str(onnx.helper.tensor_dtype_to_np_dtype(element)) if element else ""
