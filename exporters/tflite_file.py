"""A TFLite file as tensors and operations, cleaned up and turned into bytes.

Format: TFLite schema version 3, identifier "TFL3". Bytes depend on the draft alone: same draft, same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgecomp.exporters import tflite_versions

# XNNPACK and the reference kernels read weights where they lie in the file; 16 bytes is what the schema asks.
_ALIGNMENT = 16
_LIMIT = 2**31 - 2**20
_STORED_AS = {
    "float32": np.float32,
    "float16": np.float16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}


@dataclass(frozen=True, eq=False)
class Quant:
    """real = (stored - zero_point) * scale; arrays [1], or [channels] along `axis` of the stored tensor.

    `block`: elements of the last axis that share a scale (4-bit weights); `scale` is then
    [channels, blocks]. `dtype`: what an activation on this scale is stored as, int8 or int16.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int = 0
    block: int = 0
    dtype: str = "int8"

    @classmethod
    def of(cls, scale: float, zero_point: int = 0, dtype: str = "int8") -> Quant:
        return cls(np.array([scale], np.float32), np.array([zero_point], np.int64), dtype=dtype)

    def same(self, other: Quant | None) -> bool:
        return (
            other is not None
            and self.dtype == other.dtype
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )


@dataclass(eq=False)
class Tensor:
    """One tensor of the file. `dtype` is a TFLite type in lower case; `data` is set for constants.

    A 4-bit constant holds one value in each int8 element; it is packed when the file is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    quant: Quant | None = None
    data: np.ndarray | None = None


@dataclass(eq=False)
class Op:
    """One operation: builtin code in capitals, operands, and the fields of its options table."""

    code: str
    inputs: list[Tensor | None]
    outputs: list[Tensor]
    table: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def activation(name: str) -> int:
    """`relu6` -> the schema's number of that fused activation; "" is NONE."""
    return int(getattr(schema.ActivationFunctionType, name.upper() or "NONE"))


def padding(name: str) -> int:
    return int(getattr(schema.Padding, name))


def type_of(dtype: str) -> int:
    return int(getattr(schema.TensorType, dtype.upper()))


class Draft:
    """Operations in order, before they are written."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._constants: dict[tuple[Any, ...], Tensor] = {}
        self._names: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """`name`, or `name.2` and so on when it is taken."""
        count = self._names[name] = self._names.get(name, 0) + 1
        return name if count == 1 else f"{name}.{count}"

    def constant(self, array: np.ndarray, name: str, dtype: str = "", quant: Quant | None = None) -> Tensor:
        """A constant tensor; small unquantized ones (shapes, axes) are shared."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        dtype = dtype or array.dtype.name
        key = (dtype, array.shape, array.tobytes()) if quant is None and array.size <= 64 else None
        if key is not None and key in self._constants:
            return self._constants[key]
        made = Tensor(self.unique(name), tuple(array.shape), dtype, quant, array)
        if key is not None:
            self._constants[key] = made
        return made

    def emit(
        self,
        code: str,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        table: str = "",
        **options: Any,
    ) -> Tensor:
        """Append an operation; returns its first output."""
        self.ops.append(Op(code, list(inputs), list(outputs), table, options))
        return outputs[0]

    def clean(self, outputs: Sequence[Tensor]) -> None:
        """Merge chains of RESHAPE, drop those that change nothing, drop what nobody reads."""
        self._merge_reshapes(outputs)
        needed = {id(t) for t in outputs}
        kept: list[Op] = []
        for op in reversed(self.ops):
            if any(id(t) in needed for t in op.outputs):
                kept.append(op)
                needed.update(id(t) for t in op.inputs if t is not None)
        self.ops = kept[::-1]

    def _merge_reshapes(self, outputs: Sequence[Tensor]) -> None:
        fixed = {id(t) for t in outputs}
        made_by = {id(t): op for op in self.ops for t in op.outputs}
        instead: dict[int, Tensor] = {}
        for op in self.ops:
            op.inputs = [instead.get(id(t), t) if t is not None else None for t in op.inputs]
            if op.code != "RESHAPE" or op.inputs[0] is None:
                continue
            before = made_by.get(id(op.inputs[0]))
            if before is not None and before.code == "RESHAPE":
                op.inputs[0] = before.inputs[0]
            source, result = op.inputs[0], op.outputs[0]
            if source is not None and source.shape == result.shape and id(result) not in fixed:
                instead[id(result)] = source


def serialize(
    draft: Draft,
    inputs: Sequence[tuple[str, Tensor]],
    outputs: Sequence[tuple[str, Tensor]],
    metadata: Mapping[str, bytes],
) -> bytes:
    """The file. `inputs`, `outputs`: (signature name, tensor); `metadata`: name -> buffer.

    Raises OverflowError when the file would pass the 2 GiB that a flatbuffer can address.
    """
    return serialize_all({"serving_default": (draft, inputs, outputs)}, metadata)


Signature = tuple[Draft, Sequence[tuple[str, Tensor]], Sequence[tuple[str, Tensor]]]


def serialize_all(signatures: Mapping[str, Signature], metadata: Mapping[str, bytes]) -> bytes:
    """A file with a subgraph for each signature (key -> draft, inputs, outputs); equal constants are shared.

    Raises OverflowError when the file would pass the 2 GiB that a flatbuffer can address.
    """
    writer = Writer()
    model = schema.ModelT()
    model.version = 3
    model.description = "edgecomp"
    model.subgraphs, model.signatureDefs = [], []
    for index, (key, (draft, inputs, outputs)) in enumerate(signatures.items()):
        writer.next_graph()
        graph = _subgraph(writer, draft, inputs, outputs)
        graph.name = "main" if index == 0 else key
        model.subgraphs.append(graph)
        model.signatureDefs.append(writer.signature(inputs, outputs, key, index))
    model.operatorCodes = writer.codes
    model.metadata = [writer.metadata(k, v) for k, v in metadata.items()]
    model.buffers = writer.buffers
    size = sum(len(b.data) for b in writer.buffers if b.data is not None)
    if size > _LIMIT:
        raise OverflowError(f"the constants take {size} bytes; a .tflite file holds less than 2 GiB")
    builder = flatbuffers.Builder(size + (1 << 16))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _subgraph(
    writer: Writer, draft: Draft, inputs: Sequence[tuple[str, Tensor]], outputs: Sequence[tuple[str, Tensor]]
) -> Any:
    for _, tensor in inputs:
        writer.tensor(tensor)
    graph = schema.SubGraphT()
    graph.operators = [writer.operator(op) for op in draft.ops]
    graph.inputs = np.array([writer.tensor(t) for _, t in inputs], np.int32)
    graph.outputs = np.array([writer.tensor(t) for _, t in outputs], np.int32)
    graph.tensors = writer.tensors
    return graph


class _AlignedBuffer(schema.BufferT):
    """A buffer whose bytes start at a multiple of 16 (the generated class ignores `force_align`)."""

    def Pack(self, builder: flatbuffers.Builder) -> int:
        if self.data is None or len(self.data) == 0:
            schema.BufferStart(builder)
            return int(schema.BufferEnd(builder))
        builder.StartVector(1, len(self.data), _ALIGNMENT)
        head = builder.head - len(self.data)
        builder.head = head
        builder.Bytes[head : head + len(self.data)] = self.data
        vector = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, vector)
        return int(schema.BufferEnd(builder))


class _Scales(schema.QuantizationParametersT):
    """Scales and zero points; equal vectors are written once in a file (`written`: their bytes -> where).

    Every channel of every weight and bias has an int64 zero point of 0: apart they take as much as the scales
    twice over.
    """

    def __init__(self, quant: Quant, written: dict[bytes, int]) -> None:
        super().__init__()
        self.scale = np.ascontiguousarray(quant.scale, np.float32)
        self.zeroPoint = np.ascontiguousarray(quant.zero_point, np.int64)
        self.quantizedDimension = quant.axis
        self._written = written

    def Pack(self, builder: flatbuffers.Builder) -> int:
        vectors = [self._vector(builder, v) for v in (self.scale, self.zeroPoint)]
        schema.QuantizationParametersStart(builder)
        schema.QuantizationParametersAddScale(builder, vectors[0])
        schema.QuantizationParametersAddZeroPoint(builder, vectors[1])
        schema.QuantizationParametersAddQuantizedDimension(builder, self.quantizedDimension)
        return int(schema.QuantizationParametersEnd(builder))

    def _vector(self, builder: flatbuffers.Builder, values: np.ndarray) -> int:
        key = values.dtype.char.encode() + values.tobytes()
        if key not in self._written:
            self._written[key] = int(builder.CreateNumpyVector(values))
        return self._written[key]


class Writer:
    """Numbers tensors, buffers and operator codes in order of first use."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.buffers: list[Any] = [_buffer(None)]
        self.codes: list[Any] = []
        self._tensor_of: dict[int, int] = {}
        self._buffer_of: dict[bytes, int] = {}
        self._code_of: dict[tuple[str, int], int] = {}
        self._scales: list[Tensor] = []
        self._written: dict[bytes, int] = {}

    def next_graph(self) -> None:
        """Begin another subgraph: tensors are numbered anew, buffers and codes are shared."""
        self.tensors, self._tensor_of = [], {}

    def tensor(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        if id(tensor) in self._tensor_of:
            return self._tensor_of[id(tensor)]
        made = schema.TensorT()
        made.name = tensor.name
        made.shape = np.array(tensor.shape, np.int32)
        made.hasRank = True
        made.type = type_of(tensor.dtype)
        made.buffer = 0 if tensor.data is None else self.buffer(_stored(tensor))
        if tensor.quant is not None:
            made.quantization = self._quantization(tensor)
        self._tensor_of[id(tensor)] = len(self.tensors)
        self.tensors.append(made)
        return len(self.tensors) - 1

    def buffer(self, data: bytes) -> int:
        if data not in self._buffer_of:
            self._buffer_of[data] = len(self.buffers)
            self.buffers.append(_buffer(data))
        return self._buffer_of[data]

    def operator(self, op: Op) -> Any:
        made = schema.OperatorT()
        made.opcodeIndex = self._code(op)
        made.inputs = np.array([self.tensor(t) for t in op.inputs], np.int32)
        made.outputs = np.array([self.tensor(t) for t in op.outputs], np.int32)
        if op.table:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, op.table)
            made.builtinOptions = getattr(schema, op.table + "T")()
            for key, value in op.options.items():
                if not hasattr(made.builtinOptions, key):
                    raise AttributeError(f"{op.table} has no field {key!r}")
                setattr(made.builtinOptions, key, value)
        return made

    def signature(
        self,
        inputs: Sequence[tuple[str, Tensor]],
        outputs: Sequence[tuple[str, Tensor]],
        key: str = "serving_default",
        graph: int = 0,
    ) -> Any:
        made = schema.SignatureDefT()
        made.signatureKey, made.subgraphIndex = key, graph
        made.inputs = [self._named(name, tensor) for name, tensor in inputs]
        made.outputs = [self._named(name, tensor) for name, tensor in outputs]
        return made

    def metadata(self, name: str, data: bytes) -> Any:
        made = schema.MetadataT()
        made.name = name
        made.buffer = self.buffer(data)
        return made

    def _named(self, name: str, tensor: Tensor) -> Any:
        made = schema.TensorMapT()
        made.name = name
        made.tensorIndex = self.tensor(tensor)
        return made

    def _code(self, op: Op) -> int:
        version = tflite_versions.of(op)
        key = (op.code, version)
        if key not in self._code_of:
            made = schema.OperatorCodeT()
            made.builtinCode = getattr(schema.BuiltinOperator, op.code)
            made.deprecatedBuiltinCode = min(made.builtinCode, 127)
            made.version = version
            self._code_of[key] = len(self.codes)
            self.codes.append(made)
        return self._code_of[key]

    def _quantization(self, tensor: Tensor) -> Any:
        quant = tensor.quant
        if quant is not None and not quant.block:
            return _Scales(quant, self._written)
        made = schema.QuantizationParametersT()
        if quant is not None:
            made.detailsType = schema.QuantizationDetails.BlockwiseQuantization
            made.details = schema.BlockwiseQuantizationT()
            scales = Tensor(
                tensor.name + ":scale", quant.scale.shape, "float16", None, quant.scale.astype(np.float16)
            )
            self._scales.append(scales)  # kept, so that its id stays its own
            made.details.scales = self.tensor(scales)
            made.details.zeroPoints = -1
            made.details.blockSize = quant.block
        return made


def _buffer(data: bytes | None) -> Any:
    made = _AlignedBuffer()
    made.data = data
    return made


def _stored(tensor: Tensor) -> bytes:
    """The bytes of a constant: little endian; 4-bit values two to a byte, the earlier in the low half."""
    array = tensor.data
    if array is None:
        return b""
    if tensor.dtype == "int4":
        flat = array.reshape(-1).astype(np.int8).view(np.uint8) & 0x0F
        flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
        return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8).tobytes()
    return (
        np.ascontiguousarray(array, _STORED_AS[tensor.dtype])
        .astype(np.dtype(_STORED_AS[tensor.dtype]).newbyteorder("<"))
        .tobytes()
    )
