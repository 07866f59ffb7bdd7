"""An `.mlpackage` as data: its description, its metadata, and the operations of its MIL program."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from edgecomp.errors import ArtifactError
from edgecomp.runtimes.coreml_proto import Model_pb2
from edgecomp.runtimes.coreml_values import Type, decode, type_of
from edgecomp.spec import TensorSpec

Constant = np.ndarray | str | list[Any]

DAMAGE = (
    KeyError,
    IndexError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    StopIteration,
)
"""What a file that was changed makes parsers raise; readers turn it into ArtifactError."""

# ArrayFeatureType.ArrayDataType: 0x10000 | bits for floats, 0x20000 | bits for integers.
_DOOR_DTYPES = {65568: "float32", 65600: "float64", 65552: "float16", 131104: "int32", 131080: "int8"}


@dataclass(frozen=True)
class Name:
    """A reference to a value that the program computes, or to one of its inputs."""

    value: str


@dataclass(frozen=True, eq=False)
class Operation:
    """One MIL operation. Each input is a list of bindings (one, unless the op takes a tuple).

    `stored`: the type in which a compressed weight is stored (`uint4`, ...), "" for every other operation.
    """

    type: str
    name: str
    inputs: Mapping[str, tuple[Name | Constant, ...]]
    outputs: tuple[tuple[str, Type], ...]
    blocks: tuple[Block, ...] = ()
    stored: str = ""


@dataclass(frozen=True, eq=False)
class Block:
    """Operations in order of execution. `inputs` are set for the body and condition of a loop only."""

    inputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]

    def walk(self) -> Iterator[Operation]:
        """Every operation, those of nested blocks included."""
        for operation in self.operations:
            yield operation
            for block in operation.blocks:
                yield from block.walk()


@dataclass(frozen=True, eq=False)
class Package:
    """A function of a saved model. `states`: name -> type; `metadata`: what the author wrote into the model.

    `functions`: names of all that the model has.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: Mapping[str, Type]
    main: Block
    input_types: Mapping[str, Type]
    metadata: Mapping[str, str] = field(default_factory=dict)
    functions: tuple[str, ...] = ("main",)


def read(path: Path, function: str | None = None) -> Package:
    """Parse a package, of several functions the one of that name, else the default one.

    Raises ArtifactError when it is missing, damaged, not an ML program, or has no such function.
    """
    model_file = _model_file(path)
    model = Model_pb2.Model()
    try:
        model.ParseFromString(model_file.read_bytes())
    except (OSError, DecodeError) as error:
        raise ArtifactError(f"{model_file} cannot be parsed ({error}); export the model again") from error
    if model.WhichOneof("Type") != "mlProgram":
        kind = model.WhichOneof("Type") or "nothing"
        raise ArtifactError(f"{path} holds {kind}; expected an ML program (convert_to='mlprogram')")
    try:
        package = _package(path, model, model_file.parent, function)
    except DAMAGE as error:
        raise ArtifactError(f"{path} is damaged ({error!r}); export the model again") from error
    _check_names(package)
    return package


def _package(path: Path, model: Any, folder: Path, wanted: str | None) -> Package:
    name = wanted or model.description.defaultFunctionName or "main"
    function = _function(path, model, name)
    apart = [f for f in model.description.functions if f.name == name]
    description = apart[0] if apart else model.description
    main = _block(next(iter(function.block_specializations.values())), _Weights(folder))
    types = {i.name: type_of(i.type) for i in function.inputs}
    computed = {name: found for o in main.operations for name, found in o.outputs}
    return Package(
        path=path,
        inputs=tuple(_door(f, path, types) for f in description.input),
        outputs=tuple(_door(f, path, types | computed) for f in description.output),
        states={f.name: types[f.name] for f in description.state},
        main=main,
        input_types=types,
        metadata=dict(model.description.metadata.userDefined),
        functions=tuple(sorted(model.mlProgram.functions)),
    )


def _check_names(package: Package) -> None:
    """Raise ArtifactError when the program reads a value that nothing before it defines."""
    known = set(package.input_types)
    missing = [s.name for s in package.inputs if s.name not in known]
    missing += _undefined(package.main, known)
    missing += [s.name for s in package.outputs if s.name not in package.main.outputs]
    if missing:
        raise ArtifactError(
            f"{package.path} is damaged: nothing defines {', '.join(map(repr, missing[:5]))}; export it again"
        )


def _undefined(block: Block, known: set[str]) -> list[str]:
    defined = known | set(block.inputs)
    missing = []
    for operation in block.operations:
        read = [b.value for bindings in operation.inputs.values() for b in bindings if isinstance(b, Name)]
        missing += [name for name in read if name not in defined]
        for inner in operation.blocks:
            missing += _undefined(inner, defined)
        defined |= {name for name, _ in operation.outputs}
    return missing + [name for name in block.outputs if name not in defined]


def _model_file(path: Path) -> Path:
    """The `.mlmodel` that the package's manifest names as root."""
    manifest = path / "Manifest.json"
    if not manifest.is_file():
        raise ArtifactError(f"{path} is not an .mlpackage folder: it holds no Manifest.json")
    try:
        facts = json.loads(manifest.read_text())
        entry = facts["itemInfoEntries"][facts["rootModelIdentifier"]]
        return path / "Data" / entry["path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{manifest} is damaged ({error!r}); export the model again") from error


def _function(path: Path, model: Any, name: str) -> Any:
    functions = model.mlProgram.functions
    if name not in functions or not functions[name].block_specializations:
        raise ArtifactError(f"{path} has no function {name!r}; it has {sorted(functions) or 'none'}")
    return functions[name]


class _Weights:
    """Weight files of a package, each read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, bytes] = {}

    def __call__(self, name: str) -> bytes:
        if name not in self._read:
            file = self._folder / name.removeprefix("@model_path/")
            try:
                self._read[name] = file.read_bytes()
            except OSError as error:
                raise ArtifactError(
                    f"the program needs {file}, which cannot be read: {error.strerror}"
                ) from error
        return self._read[name]


def _block(message: Any, weights: _Weights) -> Block:
    return Block(
        inputs=tuple(i.name for i in message.inputs),
        operations=tuple(_operation(o, weights) for o in message.operations),
        outputs=tuple(message.outputs),
    )


def _operation(message: Any, weights: _Weights) -> Operation:
    attributes = {k: decode(v, weights) for k, v in message.attributes.items()}
    name = str(attributes.pop("name", message.outputs[0].name if message.outputs else message.type))
    inputs: dict[str, tuple[Name | Constant, ...]] = {k: (v,) for k, v in attributes.items()}
    for parameter, argument in message.inputs.items():
        inputs[parameter] = tuple(
            Name(b.name) if b.WhichOneof("binding") == "name" else decode(b.value, weights)
            for b in argument.arguments
        )
    return Operation(
        type=message.type,
        name=name,
        inputs=inputs,
        outputs=tuple((o.name, type_of(o.type)) for o in message.outputs),
        blocks=tuple(_block(b, weights) for b in message.blocks),
        stored=_stored(message),
    )


def _door(feature: Any, path: Path, types: Mapping[str, Type]) -> TensorSpec:
    """An input or output of the description; the program's type fills in a shape that it leaves out."""
    if feature.type.WhichOneof("Type") != "multiArrayType":
        kind = feature.type.WhichOneof("Type")
        raise ArtifactError(f"{feature.name!r} of {path} is {kind}; this runtime takes multi-arrays only")
    array = feature.type.multiArrayType
    dtype = _DOOR_DTYPES.get(array.dataType)
    if dtype is None:
        raise ArtifactError(f"{feature.name!r} of {path} has array type {array.dataType}, which is unknown")
    shape = tuple(int(d) for d in array.shape) or types[feature.name].shape
    if any(d < 1 for d in shape):
        raise ArtifactError(f"{feature.name!r} of {path} has shape {shape}; every dimension must be known")
    return TensorSpec(feature.name, shape, dtype)


# The parameter of a compressed weight that holds its integers.
_STORED_IN = ("indices", "data", "quantized_data", "nonzero_data", "indices_nonzero_data")


def _stored(message: Any) -> str:
    """The type of a compressed weight's integers; indices packed in bytes (iOS 16) by the palette's size."""
    if not message.type.startswith("constexpr_"):
        return ""
    if "lut" in message.attributes:
        entries = type_of(message.attributes["lut"].type).count
        return f"uint{entries.bit_length() - 1}"
    found = {k: type_of(v.type).dtype for k, v in message.attributes.items()}
    for parameter, argument in message.inputs.items():
        if argument.arguments[0].WhichOneof("binding") == "value":
            found[parameter] = type_of(argument.arguments[0].value.type).dtype
    return next((found[p] for p in _STORED_IN if p in found), "")
