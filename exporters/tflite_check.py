"""What an integer file must hold: scales that the kernels take, and no float unless the plan says so."""

from __future__ import annotations

from collections.abc import Collection

from edgecomp.exporters.tflite_file import Draft, Op, Tensor
from edgecomp.exporters.tflite_table import Unsupported

_FLOATS = ("float32", "float16")
_BORDERS = ("QUANTIZE", "DEQUANTIZE")


# Output steps that one step of the operands may be: XNNPACK refuses to prepare a convolution above the
# first, and the kernels of ADD and SUB abort the process above 2^20 (LiteRT 2.3.0).
LARGEST_PRODUCT = 2.0**8
LARGEST_TERM = 2.0**16


def check_scale(step: float, output_scale: float, limit: float) -> None:
    """Raise Unsupported when `step`, one step of what is computed, is `limit` output steps or more."""
    if step >= limit * output_scale:
        raise Unsupported(
            f"the scale of its output is {output_scale:g}, and what it computes has steps of {step:g}; "
            f"runtimes take less than {limit:g} times. Its output was zero in calibration: calibrate with "
            "other data, or remove the layer"
        )


def float_operations(draft: Draft) -> list[tuple[str, str]]:
    """(operation, name of its float tensor) for each operation that reads or writes a float."""
    return [(op.code, found) for op in draft.ops if (found := _float_of(op)) is not None]


def _float_of(op: Op) -> str | None:
    tensors: list[Tensor] = [t for t in (*op.inputs, *op.outputs) if t is not None]
    return next((t.name for t in tensors if t.dtype in _FLOATS), None)


def unexpected_floats(draft: Draft, allowed: Collection[str]) -> list[tuple[str, str]]:
    """Float operations other than those of nodes in `allowed` (node names) and the QUANTIZE and DEQUANTIZE
    operations around them.
    """
    return [
        (op.code, next(t.name for t in op.outputs))
        for op in draft.ops
        if _float_of(op) is not None and not _is_allowed(op, allowed)
    ]


def _is_allowed(op: Op, allowed: Collection[str]) -> bool:
    if op.code in _BORDERS:
        return bool(allowed)
    return all(node_of(t.name) in allowed for t in op.outputs)


def node_of(tensor_name: str) -> str:
    """`features.0.conv/conv2d:padded.2` -> `conv2d`: the graph node that a tensor belongs to."""
    name = tensor_name.rpartition("/")[2].partition(":")[0]
    head, _, number = name.rpartition(".")
    return head if head and number.isdigit() else name
