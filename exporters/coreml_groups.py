"""Weights of a plan that holds weights alone: its integers as `constexpr_blockwise_shift_scale`.

Source of the operation: coremltools, `converters/mil/mil/ops/defs/iOS18/compression.py`. Data are int4
or int8 [out, in], scale [out, groups] in the program's float type, offset (where a zero point is not 0) as
the data. Integers of 2, 3 or 6 bits are indices (`constexpr_lut_to_dense`) into one table of the integers
themselves, whose result is the data: the bits that were decided, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecomp.exporters.coreml_blob import BlobWriter, value_of
from edgecomp.exporters.coreml_compress import FLOAT_TYPES, operation
from edgecomp.exporters.coreml_toolkit import MIL_pb2
from edgecomp.exporters.coreml_weights import Weight
from edgecomp.numerics import groupwise
from edgecomp.spec import Problem, TensorQuantization

_TYPES = {4: MIL_pb2.INT4, 8: MIL_pb2.INT8}
_INDICES = {2: MIL_pb2.UINT2, 3: MIL_pb2.UINT3, 6: MIL_pb2.UINT6}


@dataclass(frozen=True)
class Planned:
    """Stores what `quantize-weights` decided; a weight that it left float stays float, and is listed."""

    plan: Mapping[str, TensorQuantization]

    def __call__(self, weight: Weight, writer: BlobWriter, const: Any) -> list[Any] | Problem:
        decided = self.plan.get(weight.module)
        if decided is None and set(weight.layers) == {"gather"} and "weight" not in weight.module:
            return weight.problem("a computed table (rotations, positions), no weight: it stays float")
        if decided is None or decided.values is None:
            return weight.problem("the plan has no integers for it")
        if decided.values.shape != weight.array.shape:
            shapes = f"{list(weight.array.shape)}, not {list(decided.values.shape)}"
            return weight.problem(f"the converter changed its shape to {shapes}")
        scale, zero, _ = groupwise.in_groups(decided)
        bits = decided.spec.bits
        data_type = _TYPES.get(bits, MIL_pb2.INT8)
        inputs = {
            "scale": value_of(
                writer, np.ascontiguousarray(scale, weight.array.dtype), FLOAT_TYPES[weight.array.dtype.name]
            ),
        }
        if zero.any():
            inputs["offset"] = value_of(writer, zero.astype(np.int8), data_type)
        if bits in _TYPES:
            inputs["data"] = value_of(writer, decided.values, data_type)
            return [operation("constexpr_blockwise_shift_scale", const, inputs)]
        table = _table(decided.values, bits, const, writer)
        restored = operation("constexpr_blockwise_shift_scale", const, inputs)
        restored.inputs["data"].arguments.add().name = table.outputs[0].name
        return [table, restored]


def _table(values: np.ndarray, bits: int, const: Any, writer: BlobWriter) -> Any:
    """Integers int8 [out, in] of 2, 3 or 6 bits as indices into all integers of so many bits."""
    half = 1 << (bits - 1)
    all_of_them = np.arange(-half, half, dtype=np.int8).reshape(1, 1, 2 * half, 1)
    named = MIL_pb2.Operation.FromString(const.SerializeToString())
    name = const.outputs[0].name + "_integers"
    named.outputs[0].name = name
    named.attributes["name"].immediateValue.tensor.strings.values[:] = [name]
    named.outputs[0].type.tensorType.dataType = MIL_pb2.INT8
    inputs = {
        "indices": value_of(writer, (values.astype(np.int16) + half).astype(np.uint8), _INDICES[bits]),
        "lut": value_of(writer, all_of_them, MIL_pb2.INT8),
    }
    return operation("constexpr_lut_to_dense", named, inputs)
