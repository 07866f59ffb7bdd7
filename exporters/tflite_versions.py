"""The version of each builtin operation that a runtime must have, by operand types.

Facts from LiteRT's `tools/versioning/op_version.cc`: a runtime refuses an operation whose version is above
what it registers, so the lowest version that covers the operands keeps a file loadable on old runtimes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgecomp.exporters.tflite_file import Op

# (code) -> {dtype of the first input: version}; other dtypes have version 1.
_BY_INPUT: dict[str, dict[str, int]] = {
    "ABS": {"int32": 5, "int16": 3, "int8": 2},
    "ADD": {"int64": 4, "int16": 3, "int8": 2},
    "ARG_MAX": {"bool": 3, "int8": 2},
    "ARG_MIN": {"bool": 3, "int8": 2},
    "AVERAGE_POOL_2D": {"int16": 3, "int8": 2},
    "BATCH_MATMUL": {"int16": 3, "int8": 2},
    "CONCATENATION": {"int16": 3, "int8": 2},
    "DEPTH_TO_SPACE": {"int8": 2},
    "EQUAL": {"int16": 4, "int8": 2},
    "EXP": {"int16": 2, "int8": 2},
    "FLOOR_DIV": {"int16": 3, "int8": 3, "float32": 2},
    "FLOOR_MOD": {"int16": 2, "int8": 2},
    "GATHER_ND": {"bool": 5, "int16": 3},
    "GELU": {"int16": 3, "int8": 2},
    "GREATER": {"int8": 2},
    "GREATER_EQUAL": {"int16": 3, "int8": 2},
    "LEAKY_RELU": {"int16": 2},
    "LESS": {"int16": 3, "int8": 2},
    "LESS_EQUAL": {"int8": 2},
    "LOG": {"int16": 2, "int8": 2},
    "LOGISTIC": {"int16": 3, "int8": 2},
    "LOG_SOFTMAX": {"int8": 2},
    "MAX_POOL_2D": {"int16": 3, "int8": 2},
    "MEAN": {"int16": 3, "int8": 2},
    "MIRROR_PAD": {"int16": 3, "int8": 2},
    "NOT_EQUAL": {"int8": 2},
    "PACK": {"int16": 3, "int8": 2},
    "REDUCE_MAX": {"int16": 3, "int8": 2},
    "REDUCE_MIN": {"int16": 3, "int8": 2},
    "REDUCE_PROD": {"int16": 2, "int8": 2},
    "RELU": {"int16": 3, "int8": 2},
    "RELU6": {"int16": 3, "int8": 2},
    "REVERSE_V2": {"int8": 3, "bool": 2},
    "RSQRT": {"int16": 3, "int8": 2},
    "SIGN": {"int32": 2},
    "SOFTMAX": {"int16": 3, "int8": 2},
    "SPACE_TO_DEPTH": {"int8": 2},
    "SPLIT_V": {"int8": 2},
    "SQRT": {"int16": 2, "int8": 2},
    "SQUARED_DIFFERENCE": {"int8": 2},
    "SUM": {"int8": 2},
    "TANH": {"int16": 3, "int8": 2},
    "TILE": {"int8": 3},
    "TOPK_V2": {"int16": 3, "int8": 2},
    "UNPACK": {"int16": 4, "bool": 3, "int8": 2},
}


def of(op: Op) -> int:
    """The lowest version of `op.code` that covers its operands."""
    rule = _RULES.get(op.code)
    if rule is not None:
        return rule(op)
    return _BY_INPUT.get(op.code, {}).get(_dtype(op, 0), 1)


def _dtype(op: Op, index: int) -> str:
    tensor = op.inputs[index] if index < len(op.inputs) else None
    return "" if tensor is None else tensor.dtype


def _rank(op: Op) -> int:
    return max(len(t.shape) for t in op.inputs if t is not None)


def _per_channel(op: Op, index: int) -> bool:
    tensor = op.inputs[index]
    return tensor is not None and tensor.quant is not None and tensor.quant.scale.size > 1


def _broadcasts(op: Op) -> bool:
    shapes = {t.shape for t in op.inputs if t is not None}
    return len(shapes) > 1


def _conv(op: Op) -> int:
    x, weight = op.inputs[0], op.inputs[1]
    grouped = x is not None and weight is not None and x.shape[-1] != weight.shape[-1]
    if grouped:
        return 6
    by_types = {("int8", "int4"): 7, ("int16", "int8"): 4, ("int8", "int8"): 3}
    if _dtype(op, 0) == "float32" and _dtype(op, 1) in ("int8", "int4"):
        return 5 if _per_channel(op, 1) else 2
    return by_types.get((_dtype(op, 0), _dtype(op, 1)), 1)


def _depthwise(op: Op) -> int:
    types = (_dtype(op, 0), _dtype(op, 1))
    if types == ("float32", "int8"):
        return 6 if _per_channel(op, 1) else 4
    dilated = op.options.get("dilationWFactor", 1) != 1 or op.options.get("dilationHFactor", 1) != 1
    by_types = {("int8", "int4"): 7, ("int16", "int8"): 5, ("int8", "int8"): 3}
    return by_types.get(types, 2 if dilated else 1)


def _fully_connected(op: Op) -> int:
    types = (_dtype(op, 0), _dtype(op, 1))
    if types == ("float32", "int8") and _per_channel(op, 1):
        return 12
    if types[1] == "int4":
        return 10
    if types[0] == "int16":
        return 7
    if op.options.get("keepNumDims"):
        return 5
    if types == ("float32", "int8"):
        return 9 if op.options.get("asymmetricQuantizeInputs") else 3
    return 4 if types[0] == "int8" else 1


def _transpose_conv(op: Op) -> int:
    if len(op.inputs) == 4 and op.inputs[3] is not None:
        return 3
    return 2 if _dtype(op, 2) == "int8" else 1


def _gather(op: Op) -> int:
    if op.options.get("batchDims"):
        return 5
    return {"int4": 7, "int16": 4, "bool": 3, "int8": 2}.get(_dtype(op, 0), 1)


def _mul(op: Op) -> int:
    by_type = {"int64": 5, "int16": 4}.get(_dtype(op, 0))
    if by_type is not None:
        return by_type
    first, second, result = op.inputs[0], op.inputs[1], op.outputs[0]
    quants = [t.quant for t in (first, second, result) if t is not None and t.quant is not None]
    if len(quants) == 3 and quants[0].scale[0] * quants[1].scale[0] / quants[2].scale[0] >= 1.0:
        return 3
    return 2 if _dtype(op, 0) == "int8" else 1


def _sub(op: Op) -> int:
    by_type = {"int16": 5, "int64": 4}.get(_dtype(op, 0))
    if by_type is not None:
        return by_type
    if _broadcasts(op) and _rank(op) > 4:
        return 3
    return 2 if _dtype(op, 0) == "int8" else 1


def _extreme(op: Op) -> int:
    if _dtype(op, 0) == "int16":
        return 4
    if _broadcasts(op) and _rank(op) > 4:
        return 3
    return 2 if _dtype(op, 0) == "int8" else 1


def _transpose(op: Op) -> int:
    rank = len(op.inputs[0].shape) if op.inputs[0] is not None else 0
    if rank > 5:
        return 6
    if _dtype(op, 0) == "int16":
        return 5
    if rank > 4:
        return 4
    return {"bool": 3, "int8": 2}.get(_dtype(op, 0), 1)


def _slice(op: Op) -> int:
    if _rank(op) > 4:
        return 5
    return {"int16": 4, "int8": 2}.get(_dtype(op, 0), 1)


def _strided_slice(op: Op) -> int:
    if _rank(op) > 4:
        return 4
    return {"bool": 3, "int8": 2}.get(_dtype(op, 0), 1)


def _pad(op: Op) -> int:
    if _rank(op) > 4:
        return 4
    return {"int16": 3, "int8": 2}.get(_dtype(op, 0), 1)


def _split(op: Op) -> int:
    return {"int16": 4, "int32": 3, "int8": 2}.get(_dtype(op, 1), 1)


def _resize(op: Op) -> int:
    if _dtype(op, 0) == "int16":
        return 4
    if op.options.get("halfPixelCenters"):
        return 3
    if op.options.get("alignCorners") and op.code == "RESIZE_NEAREST_NEIGHBOR":
        return 3
    return 2 if _dtype(op, 0) == "int8" else 1


def _dequantize(op: Op) -> int:
    if _dtype(op, 0) == "int8":
        return 5 if _per_channel(op, 0) else 2
    return {"int4": 6, "int16": 3, "float16": 3}.get(_dtype(op, 0), 1)


def _cast(op: Op) -> int:
    types = {_dtype(op, 0), op.outputs[0].dtype}
    if "float16" in types:
        return 5
    return 3 if "int8" in types else 1


_RULES: dict[str, Callable[[Op], int]] = {
    "BROADCAST_TO": lambda op: 3 if _dtype(op, 0) in ("int8", "int16") else 2,
    "CAST": _cast,
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _depthwise,
    "DEQUANTIZE": _dequantize,
    "DIV": lambda op: 2 if _broadcasts(op) and _rank(op) > 4 else 1,
    "FULLY_CONNECTED": _fully_connected,
    "GATHER": _gather,
    "MAXIMUM": _extreme,
    "MINIMUM": _extreme,
    "MUL": _mul,
    "PAD": _pad,
    "PADV2": _pad,
    "QUANTIZE": lambda op: 2 if op.outputs[0].dtype == "int16" else 1,
    "RESIZE_BILINEAR": _resize,
    "RESIZE_NEAREST_NEIGHBOR": _resize,
    "SLICE": _slice,
    "SPLIT": _split,
    "STRIDED_SLICE": _strided_slice,
    "SUB": _sub,
    "TRANSPOSE": _transpose,
    "TRANSPOSE_CONV": _transpose_conv,
}
