"""What LiteRT will make of a TFLite file, told from the operations before they are written."""

from __future__ import annotations

from edgecomp.exporters.tflite import TFLiteExporter
from edgecomp.exporters.tflite_check import node_of
from edgecomp.exporters.tflite_file import Op, Tensor
from edgecomp.spec import Candidate, Forecast

_INTEGERS = ("int8", "int16", "uint8", "int4")
_FLOATS = ("float32", "float16")


def forecast(candidate: Candidate, target: str) -> list[Forecast]:
    """One row for each operation of the file, in order; nothing is written or calibrated.

    `candidate`: with a plan whose scales may be any. Raises UnsupportedOpError.
    """
    lowering, _, _ = TFLiteExporter(target).drafted(candidate)
    floats = lowering.plan.float_nodes
    found = []
    for op in lowering.draft.ops:
        name = op.outputs[0].name
        node, module = node_of(name), name.rpartition("/")[0]
        runs = _runs(op)
        why = floats.get(node, "") or _reason(op, lowering.numerics.integer)
        found.append(Forecast(name, op.code, module, runs, why, node, place(op)))
    return found


def _runs(op: Op) -> str:
    dtype = op.outputs[0].dtype
    return "integer" if dtype in _INTEGERS else "float" if dtype in _FLOATS else "index"


def _reason(op: Op, integer_target: bool) -> str:
    """Why an operation of the file is no integer one, or is one and not delegated; "" where it is both."""
    if _runs(op) == "integer":
        return _left_out(op) if place(op) == "CPU" else ""
    if _runs(op) == "index":
        return "computes positions or shapes, no reals"
    if not integer_target:
        return "the target keeps activations in float"
    if op.code == "DEQUANTIZE":
        return "hands integers on to an operation that stays float"
    return "an operand or the result has no scale"


def _left_out(op: Op) -> str:
    """Why the delegate leaves an integer operation to the built-in kernels."""
    if op.code in ("ADD", "SUB") and not _near(op):
        return "XNNPACK refuses it: the scales of its operands and its result are too far apart"
    return f"XNNPACK has no kernel for {op.code} of {op.outputs[0].dtype}"


# XNNPACK as LiteRT 2.1 to 2.3 carry it (tensorflow/lite/delegates/xnnpack/xnnpack_delegate.cc).
_NEVER = {
    "ARG_MAX", "ARG_MIN", "CAST", "CUMSUM", "GATHER", "GATHER_ND", "MIRROR_PAD", "PADV2", 
    "REVERSE_V2", "SELECT_V2", "SIGN", "TILE", "TOPK_V2", "LOG_SOFTMAX", "PACK", "RELU_0_TO_1",
    "RESIZE_NEAREST_NEIGHBOR", "UNPACK", "SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND", "ONE_HOT",
}  # fmt: skip
_INT8 = {
    "ADD", "AVERAGE_POOL_2D", "CONCATENATION", "CONV_2D", "DEPTHWISE_CONV_2D", "DEPTH_TO_SPACE", "DEQUANTIZE",
    "ELU", "EXPAND_DIMS", "FULLY_CONNECTED", "LEAKY_RELU", "LOGISTIC", "MAX_POOL_2D", "MEAN", "MUL", "PAD",
    "QUANTIZE", "REDUCE_MAX", "REDUCE_MIN", "RESHAPE", "RESIZE_BILINEAR", "SLICE", "SPACE_TO_DEPTH", "SPLIT",
    "SQUEEZE", "STRIDED_SLICE", "SUB", "SUM", "TANH", "TRANSPOSE", "TRANSPOSE_CONV",
}  # fmt: skip


# ADD and SUB of integers: what one step of an operand may be in steps of the result.
_RATIO = (2.0**-10, 2.0**8)


def place(op: Op) -> str:
    """`XNNPACK` where the default delegate has a kernel for the operation and its types, else `CPU`."""
    dtypes = {t.dtype for t in _activations(op)}
    if op.code in _NEVER or dtypes & {"int16", "int32", "int64", "bool"}:
        return "CPU"
    if op.code in ("ADD", "SUB") and not _near(op):
        return "CPU"
    if "int8" in dtypes:
        return "XNNPACK" if op.code in _INT8 else "CPU"
    return "XNNPACK"


def _near(op: Op) -> bool:
    """Are the scales of the operands near enough to the result's?"""
    result = op.outputs[0].quant
    scales = [t.quant.scale[0] / result.scale[0] for t in op.inputs if t is not None and t.quant and result]
    return all(_RATIO[0] <= scale < _RATIO[1] for scale in scales)


def _activations(op: Op) -> list[Tensor]:
    """Operands that are computed, and the results; other operands are weights, shapes and axes."""
    return [t for t in (*op.inputs, *op.outputs) if t is not None and t.data is None]
