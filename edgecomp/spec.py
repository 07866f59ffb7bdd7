"""The nouns of edgecomp: frozen dataclasses and the protocols of the rooms.

Standard library and NumPy only. A value that makes no sense fails where it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

Layout = Literal["", "NCHW", "NHWC", "NCW", "NWC", "NC"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model or artifact.

    `shape` is in the order that `layout` says; `scale` and `zero_point` are set where the tensor is
    quantized at the door: real = (stored - zero_point) * scale.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: Layout = ""
    scale: float | None = None
    zero_point: int | None = None

    def __post_init__(self) -> None:
        np.dtype(self.dtype)
        if any(not isinstance(d, int) or d < 1 for d in self.shape):
            raise ValueError(f"shape of {self.name!r} is {self.shape}; every dimension must be an int >= 1")
        if (self.scale is None) != (self.zero_point is None):
            raise ValueError(f"{self.name!r} needs both scale and zero_point, or neither")


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized. `axis` is the channel axis (None: per tensor).

    Symmetric weights use the narrow range [-(2^(b-1)-1), 2^(b-1)-1], as TFLite's specification asks;
    activations use the full signed range [-2^(b-1), 2^(b-1)-1].
    """

    bits: int = 8
    symmetric: bool = False
    axis: int | None = None
    group_size: int | None = None
    narrow: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 6, 8, 16, 32):
            raise ValueError(f"bits is {self.bits}; expected one of 2, 3, 4, 6, 8, 16, 32")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; expected 1 or more")

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) + (1 if self.narrow else 0)

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True, eq=False)
class TensorQuantization:
    """The decided quantization of one tensor: real = (q - zero_point) * scale.

    `scale` float32 and `zero_point` int32 arrays of shape [] (per tensor) or [channels] (per channel
    along `spec.axis`). `values`: the integers themselves (weights only), same shape as the tensor.
    """

    spec: QuantSpec
    scale: np.ndarray
    zero_point: np.ndarray
    values: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.scale.shape != self.zero_point.shape:
            raise ValueError(f"scale has shape {self.scale.shape}, zero_point {self.zero_point.shape}")
        if not np.all(np.isfinite(self.scale)) or np.any(self.scale <= 0):
            raise ValueError(f"scales must be finite and positive; got {self.scale.min()}")


@dataclass(frozen=True, eq=False)
class QuantizationPlan:
    """Every quantization decision of a captured graph; each exporter lowers it, none calibrates again.

    `activations`: graph node name -> quantization of its output; a node that is not listed is either
    fused into its only user (see `edgecomp.graph.patterns`) or stays float.
    `weights`: parameter name (a `get_attr` target of the graph) -> quantization, integers included.
    `float_nodes`: node name -> why it stays float.
    """

    activations: Mapping[str, TensorQuantization]
    weights: Mapping[str, TensorQuantization]
    float_nodes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Preprocessing:
    """What happened to the raw input before the model saw it; travels into every artifact.

    An 8-bit picture is resized (shorter side to `resize`, kernel `kernel`), centre-cropped to `size`
    (height, width), put in `colour_order`, and becomes `(pixel * rescale - mean) / std` per channel.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    crop: Literal["centre", "none"] = "centre"
    kernel: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    antialias: bool = True
    colour_order: Literal["RGB", "BGR", "L"] = "RGB"
    layout: Layout = "NCHW"
    rescale: float = 1.0 / 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: str = "float32"
    sample_rate: int | None = None

    def __post_init__(self) -> None:
        if any(s <= 0 for s in self.std):
            raise ValueError(f"std is {self.std}; every value must be positive")
        if len({len(self.mean), len(self.std)} - {1}) > 1:
            raise ValueError(
                f"mean has {len(self.mean)} values, std {len(self.std)}: give both alike, or one"
            )

    def exact_range(self) -> tuple[float, float]:
        """Smallest and largest value that an 8-bit pixel can become, over all channels."""
        mean, std = np.broadcast_arrays(self.mean, self.std)
        return float(((0.0 - mean) / std).min()), float(((255.0 * self.rescale - mean) / std).max())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Preprocessing:
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
        return cls(**lists)


@dataclass(frozen=True)
class Batch:
    """`inputs`: one array [N, ...] for each model input; `targets` [N, ...] or None; `rows`: metadata."""

    inputs: tuple[np.ndarray, ...]
    targets: np.ndarray | None = None
    rows: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.inputs[0])


@runtime_checkable
class DataSource(Protocol):
    """A finite, ordered, re-iterable set of samples, already preprocessed as the torch model takes them."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def preprocessing(self) -> Preprocessing | None: ...

    def __len__(self) -> int: ...

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Data:
    """The three roles of data. A step takes what it needs and says so when it is missing."""

    train: DataSource | None = None
    calibration: DataSource | None = None
    evaluation: DataSource | None = None


@dataclass(frozen=True)
class Problem:
    """An operation that a target cannot express, or a layer left out, with the reason."""

    op: str
    module: str
    reason: str


@dataclass(frozen=True)
class StepRecord:
    """One line of a candidate's history."""

    name: str
    kind: str
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Candidate:
    """What a step takes and gives. A step never changes the candidate that it was given.

    `module`: a `torch.nn.Module` in eval mode. `inputs`: its inputs, batch dimension first (1).
    `quantization`: None, or the plan; the module is then the captured float graph that the plan names.
    `original`: the float module that the chain started from (teacher and reference), or None.
    """

    module: Any
    inputs: tuple[TensorSpec, ...]
    quantization: QuantizationPlan | None = None
    history: tuple[StepRecord, ...] = ()
    original: Any = None


@dataclass(frozen=True)
class Artifact:
    """A file (or `.mlpackage` folder) that a runtime opens, with what its manifest says."""

    path: Path
    format: str
    target: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sha256: str
    size_bytes: int
    history: tuple[StepRecord, ...] = ()
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    skipped: tuple[Problem, ...] = ()
    recipe_sha256: str | None = None
    golden: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OpPlacement:
    """Where one operation of a loaded artifact runs. `ms` is None when it was not measured."""

    name: str
    type: str
    placed_on: str
    dtype: str = ""
    ms: float | None = None


@dataclass(frozen=True)
class StoredWeight:
    """A weight as an artifact stores it. `bytes`: its values with their scales, zero points or palettes."""

    name: str
    elements: int
    dtype: str
    bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8.0 * self.bytes / self.elements


@dataclass(frozen=True)
class Forecast:
    """What one operation of an artifact will be, told before it is written.

    `name`: the value that it gives, as the artifact will name it. `runs`: `integer`, `float`, `index` (of
    positions or shapes), `inside` (computed by the operation before it), or `none` (the target cannot express
    it). `why`: the reason where it is not `integer`. `node`: the graph node that it comes from. `placed_on`:
    where it will run, "" where that is not told.
    """

    name: str
    type: str
    module: str
    runs: str
    why: str
    node: str
    placed_on: str = ""


class Step(Protocol):
    """A compression step: a dataclass whose fields are the recipe's keys."""

    def __call__(self, candidate: Candidate, data: Data) -> Candidate: ...


class Exporter(Protocol):
    """Lowers a candidate to one target. Made by the registry as `factory(target=..., **settings)`."""

    target: str

    def problems(self, candidate: Candidate) -> list[Problem]:
        """What the target cannot express; cheap, called before any work."""
        ...

    def export(self, candidate: Candidate, data: Data, out: Path) -> Artifact:
        """Write the artifact to `out` (its final name comes only after success) and describe it."""
        ...


class Session(Protocol):
    """An opened artifact. Arrays go in and out exactly as `inputs` and `outputs` say (dtype, layout)."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]: ...

    def placement(self) -> list[OpPlacement]: ...


class Runtime(Protocol):
    """Opens artifacts of one format. `optimize=False` asks for reference kernels, graph as written."""

    name: str
    version: str

    def open(self, path: Path, *, threads: int = 1, optimize: bool = True) -> Session: ...


@dataclass(frozen=True)
class CommandResult:
    """What a command on a device gave back."""

    argv: tuple[str, ...]
    exit_code: int
    stdout: str
    stderr: str


class Device(Protocol):
    """A machine that can run an artifact: the host, a board over SSH, a phone over adb."""

    name: str
    kind: str

    def run(self, argv: Sequence[str], timeout_s: float) -> CommandResult: ...

    def push(self, source: Path, destination: str) -> None: ...

    def pull(self, source: str, destination: Path) -> None: ...

    def probe(self) -> dict[str, Any]: ...
