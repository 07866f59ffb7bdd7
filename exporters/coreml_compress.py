"""Compressed weights as `constexpr_*` operations: palettes, and linear integers per channel or per block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgecomp.exporters.coreml_blob import BlobWriter, value_of
from edgecomp.exporters.coreml_importance import Importance
from edgecomp.exporters.coreml_toolkit import MIL_pb2
from edgecomp.exporters.coreml_weights import Weight
from edgecomp.numerics import packing, palettes
from edgecomp.spec import Problem, TensorQuantization

_INDEX_TYPES = {1: MIL_pb2.UINT1, 2: MIL_pb2.UINT2, 3: MIL_pb2.UINT3, 4: MIL_pb2.UINT4, 6: MIL_pb2.UINT6}
FLOAT_TYPES = {"float16": MIL_pb2.FLOAT16, "float32": MIL_pb2.FLOAT32}


_ROWS = 64
"""An embedding's palettes cover this many times the rows that a layer's cover channels."""


def largest_divisor(count: int, at_most: int) -> int:
    """The largest divisor of `count` that is at most `at_most`."""
    return max(d for d in range(1, min(count, at_most) + 1) if count % d == 0)


def palette_group(asked: int, bits: int, channels: int, count: int) -> int:
    """Output channels that share a palette: `asked` where that divides and pays.

    2^bits entries of 16 bits pay when the `count / channels` indices of each channel in the group, of `bits`
    bits, are as long together: n * bits >= 16 * 2^bits.
    """
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    enough = -(-(16 << bits) * channels // (bits * count))
    size = next(d for d in divisors if d >= min(enough, channels))
    return max(size, *(d for d in divisors if d <= asked))


@dataclass(frozen=True)
class Palettize:
    """Indices of `bits` bits into palettes shared by `group_size` output channels (None: one per tensor).

    A group is made larger until its indices take as many bits as its palette, smaller where the channels do
    not divide; both are noted. `modern` False: the iOS 16 form, one palette per tensor. `depthwise`: what
    becomes of depthwise convolutions, whose few weights per channel differ most in range. `importance`: what
    the palettes weigh errors by (None: all alike). `palette_dtype`: float16, or int8 with a scale per group.
    `bits_of`: name of a weight -> 4, 6 or 8 bits (integers per channel), where they are not `bits`.
    """

    bits: int
    group_size: int | None
    modern: bool
    min_elements: int
    depthwise: str
    importance: Importance | None
    palette_dtype: str
    notes: list[Problem]
    bits_of: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, weight: Weight, writer: BlobWriter, const: Any) -> list[Any] | Problem:
        if weight.array.size < self.min_elements:
            return weight.problem(
                f"{weight.array.size} weights; at least {self.min_elements} are needed for a palette to pay"
            )
        if self.depthwise != "palette" and _is_depthwise(weight):
            return self._depthwise(weight, writer, const)
        bits = self.bits_of.get(weight.module, self.bits)
        if bits == 8:
            return Linear(8, None, self.modern, 0, {}, self.notes)(weight, writer, const)
        size = self._group(weight, bits)
        matters = self.importance.of(weight) if self.importance else None
        lut, indices = palettized(weight, bits, size, matters)
        if not self.modern:
            return [_ios16_lut(const, weight, lut, indices, bits, writer)]
        stored = value_of(writer, indices, _INDEX_TYPES[bits])
        if self.palette_dtype == "int8":
            return _nested(const, stored, lut, writer)
        palette = value_of(writer, lut, FLOAT_TYPES[lut.dtype.name])
        return [operation("constexpr_lut_to_dense", const, {"indices": stored, "lut": palette})]

    def _depthwise(self, weight: Weight, writer: BlobWriter, const: Any) -> list[Any] | Problem:
        if self.depthwise == "float":
            return weight.problem("depthwise convolutions stay float by the setting depthwise")
        self.notes.append(weight.problem("depthwise: 8-bit integers per channel instead of a palette"))
        return Linear(8, None, self.modern, 0, {}, self.notes)(weight, writer, const)

    def _group(self, weight: Weight, bits: int) -> int:
        """Output channels that share a palette."""
        channels = weight.array.shape[weight.axis]
        asked = int(self.group_size or channels)
        if "gather" in weight.layers:  # rows of an embedding are many and alike
            rows = min(_ROWS * asked, channels)
            return next(d for d in range(rows, channels + 1) if channels % d == 0)
        size = palette_group(asked, bits, channels, weight.array.size)
        if size != asked and self.group_size is not None:
            reason = f"{asked} does not divide {channels}" if size < asked else "smaller ones would not pay"
            self.notes.append(weight.problem(f"palettes of {size} output channels, not {asked}: {reason}"))
        return size


def _nested(const: Any, indices: Any, lut: np.ndarray, writer: BlobWriter) -> list[Any]:
    """The palette as int8 with one scale for each group: half the bytes, entries off by 0.4 % at most."""
    top = np.abs(lut.astype(np.float32)).max(axis=(-2, -1), keepdims=True) / 127
    scale = np.where(top > 0, top, 1.0).astype(lut.dtype)
    integers = np.clip(np.rint(lut.astype(np.float32) / scale.astype(np.float32)), -127, 127)
    outer = MIL_pb2.Operation.FromString(const.SerializeToString())
    name = const.outputs[0].name + "_palette"
    outer.outputs[0].name = name
    outer.attributes["name"].immediateValue.tensor.strings.values[:] = [name]
    del outer.outputs[0].type.tensorType.dimensions[:]
    outer.outputs[0].type.tensorType.rank = lut.ndim
    for size in lut.shape:
        outer.outputs[0].type.tensorType.dimensions.add().constant.size = size
    parts = {
        "data": value_of(writer, integers.astype(np.int8), MIL_pb2.INT8),
        "scale": value_of(writer, scale, FLOAT_TYPES[lut.dtype.name]),
    }
    dense = operation("constexpr_lut_to_dense", const, {"indices": indices})
    dense.inputs["lut"].arguments.add().name = name
    return [operation("constexpr_blockwise_shift_scale", outer, parts), dense]


def _is_depthwise(weight: Weight) -> bool:
    return "conv" in weight.layers and weight.array.ndim > 2 and weight.array.shape[1] == 1


def palettized(
    weight: Weight, bits: int, group_size: int, importance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(lut [.., groups, .., 2^bits, 1], indices with the weight's shape): weight ~ lut[group][index].

    `importance` of every weight, the weight's shape; None: all alike.
    """
    groups = weight.array.shape[weight.axis] // group_size
    front = np.moveaxis(weight.array, weight.axis, 0)
    rows = front.reshape(groups, -1).astype(np.float32)
    matters = None if importance is None else np.moveaxis(importance, weight.axis, 0).reshape(rows.shape)
    found = palettes.fit(rows, 1 << bits, importance=matters, dtype=weight.array.dtype)
    indices = np.moveaxis(found.indices.reshape(front.shape), 0, weight.axis)
    shape = [1] * weight.array.ndim + [1 << bits, 1]
    shape[weight.axis] = groups
    return found.lut.astype(weight.array.dtype).reshape(shape), np.ascontiguousarray(indices)


@dataclass(frozen=True)
class Linear:
    """int8 per output channel, or int4 per block of `block_size` inputs; symmetric, no offset.

    `plan`: quantization decided before export, by name of the parameter; taken as it is where it fits.
    """

    bits: int
    block_size: int | None
    modern: bool
    min_elements: int
    plan: Mapping[str, TensorQuantization]
    notes: list[Problem]

    def __call__(self, weight: Weight, writer: BlobWriter, const: Any) -> list[Any] | Problem:
        if weight.array.size < self.min_elements:
            return weight.problem(f"{weight.array.size} weights; at least {self.min_elements} are needed")
        integers, scale = self._planned(weight) or self._fitted(weight)
        scale = scale.astype(weight.array.dtype)
        data_type = MIL_pb2.INT8 if self.bits == 8 else MIL_pb2.INT4
        if not self.modern:
            return [_ios16_affine(const, weight, integers, scale, writer)]
        inputs = {
            "data": value_of(writer, integers, data_type),
            "scale": value_of(writer, scale, FLOAT_TYPES[scale.dtype.name]),
        }
        return [operation("constexpr_blockwise_shift_scale", const, inputs)]

    def _planned(self, weight: Weight) -> tuple[np.ndarray, np.ndarray] | None:
        decided = self.plan.get(weight.module)
        if decided is None or decided.values is None or decided.spec.bits != self.bits or self.block_size:
            return None
        if decided.values.shape != weight.array.shape or decided.spec.axis != weight.axis:
            return None
        shape = [1] * weight.array.ndim
        shape[weight.axis] = -1
        return decided.values.astype(np.int8), decided.scale.reshape(shape)

    def _fitted(self, weight: Weight) -> tuple[np.ndarray, np.ndarray]:
        limit = (1 << (self.bits - 1)) - 1
        blocks = list(weight.array.shape) if self.block_size is None else self._blocks(weight)
        blocks[weight.axis] = 1
        return linear_blocks(weight.array.astype(np.float32), blocks, limit)

    def _blocks(self, weight: Weight) -> list[int]:
        """Elements of a block along every axis: `block_size` along the inputs, 1 elsewhere but the kernel."""
        blocks = list(weight.array.shape)
        axis = 0 if weight.axis == 1 else 1
        if weight.array.ndim > 1:
            blocks[axis] = largest_divisor(blocks[axis], int(self.block_size or 1))
            if blocks[axis] != self.block_size and weight.array.shape[axis] >= int(self.block_size or 1):
                self.notes.append(
                    weight.problem(
                        f"blocks of {blocks[axis]} inputs, not {self.block_size}: "
                        f"{self.block_size} does not divide {weight.array.shape[axis]}"
                    )
                )
        return blocks


def linear_blocks(array: np.ndarray, blocks: list[int], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric integers in [-limit, limit] and a scale for every block: array ~ integers * scale.

    `blocks`: elements of a block along each axis (divisors of the shape). The scale of a block is the one of
    24 between 60 % and 100 % of max|w| / limit with the least squared error.
    """
    split = [n for size, block in zip(array.shape, blocks, strict=True) for n in (size // block, block)]
    inner = tuple(range(1, 2 * array.ndim, 2))
    cells = array.reshape(split)
    top = np.abs(cells).max(axis=inner, keepdims=True) / limit
    top = np.where(top > 0, top, 1.0)
    best, best_error = top, np.full(top.shape, np.inf)
    for share in np.linspace(1.0, 0.6, 24):
        scale = top * share
        rounded = np.clip(np.rint(cells / scale), -limit, limit) * scale
        error = np.square(rounded - cells).sum(axis=inner, keepdims=True)
        best = np.where(error < best_error, scale, best)
        best_error = np.minimum(error, best_error)
    best = best.astype(np.float16).astype(np.float32)
    best = np.maximum(best, np.finfo(np.float16).smallest_subnormal)
    integers = np.clip(np.rint(cells / best), -limit, limit).astype(np.int8).reshape(array.shape)
    return integers, best.reshape(best.shape[0::2])


def operation(kind: str, const: Any, inputs: Mapping[str, Any]) -> Any:
    """A `constexpr_*` operation of iOS 18 that gives the value that `const` gave."""
    operation = MIL_pb2.Operation(type=kind)
    operation.attributes["name"].CopyFrom(const.attributes["name"])
    operation.outputs.extend(const.outputs)
    for name, value in inputs.items():
        operation.inputs[name].arguments.add().value.CopyFrom(value)
    return operation


def _ios16(kind: str, const: Any, attributes: Mapping[str, Any]) -> Any:
    operation = MIL_pb2.Operation(type=kind)
    operation.outputs.extend(const.outputs)
    operation.attributes["name"].CopyFrom(const.attributes["name"])
    for name, value in attributes.items():
        operation.attributes[name].CopyFrom(value)
    return operation


def _ios16_lut(
    const: Any, weight: Weight, lut: np.ndarray, indices: np.ndarray, bits: int, writer: BlobWriter
) -> Any:
    packed = np.frombuffer(packing.pack(indices, bits), np.uint8)
    attributes = {
        "indices": value_of(writer, packed, MIL_pb2.UINT8),
        "lut": value_of(writer, lut.reshape(-1), FLOAT_TYPES[lut.dtype.name]),
        "shape": value_of(writer, np.array(weight.array.shape, np.uint32), MIL_pb2.UINT32),
    }
    return _ios16("constexpr_lut_to_dense", const, attributes)


def _ios16_affine(
    const: Any, weight: Weight, integers: np.ndarray, scale: np.ndarray, writer: BlobWriter
) -> Any:
    flat = scale.reshape(-1)
    attributes = {
        "quantized_data": value_of(writer, integers, MIL_pb2.INT8),
        "scale": value_of(writer, flat, FLOAT_TYPES[scale.dtype.name]),
        "zero_point": value_of(writer, np.zeros(flat.size, np.int8), MIL_pb2.INT8),
        "axis": value_of(writer, np.array(weight.axis, np.int32), MIL_pb2.INT32),
    }
    return _ios16("constexpr_affine_dequantize", const, attributes)
