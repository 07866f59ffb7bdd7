"""coremltools, imported and called quietly, with what version 9.0 lacks.

One place for everything that depends on coremltools' inside: two operations of PyTorch that its frontend
does not know, and a repair for NumPy 2.4.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Catch prints, progress bars, log lines and warnings; yields what was printed."""
    log = io.StringIO()
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield log
        finally:
            logging.disable(disabled)


class ConversionError(Exception):
    """What coremltools or torch said when a conversion failed, on one line."""


def conversion(call: Callable[[], Result]) -> Result:
    """Run a conversion quietly, then collect what it leaves in cycles. Raises ConversionError.

    coremltools drops temporary folders without closing them; collected later they would warn at a place that
    has nothing to do with them. The error's own traceback would keep them, so it is left behind.
    """
    with quiet():
        result, cause = _attempt(call)
        gc.collect()
    if cause:
        raise ConversionError(cause)
    return result  # type: ignore[return-value]


def _attempt(call: Callable[[], Result]) -> tuple[Result | None, str]:
    try:
        return call(), ""
    except Exception as error:
        return None, first_line(error)


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


with quiet():
    import coremltools as ct
    from coremltools.converters.mil.frontend.torch import ops as torch_ops
    from coremltools.converters.mil.frontend.torch.torch_op_registry import (
        _TORCH_OPS_REGISTRY,
    )
    from coremltools.converters.mil.frontend.torch.torchscript_utils import _expand_and_optimize_ir
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.scope import ScopeSource
    from coremltools.proto import MIL_pb2, Model_pb2

VERSION: str = ct.__version__

__all__ = [
    "VERSION",
    "ConversionError",
    "MIL_pb2",
    "Model_pb2",
    "ScopeSource",
    "conversion",
    "converter_of",
    "ct",
    "first_line",
    "mb",
    "quiet",
    "torchscript_nodes",
    "types",
]


def converter_of(op: str) -> Callable[..., Any] | None:
    """coremltools' translation of a TorchScript operation (`aten::relu_`), or None."""
    found: Callable[..., Any] | None = _TORCH_OPS_REGISTRY.get_func(op.rpartition("::")[2])
    return found


def torchscript_nodes(traced: Any) -> list[Any]:
    """The nodes that coremltools will translate, after its clean-up of the traced graph."""
    with quiet():
        graph, _, _ = _expand_and_optimize_ir(traced)
    return list(graph.nodes())


def _new_ones(context: Any, node: Any) -> None:
    """Tensor.new_ones(size, dtype): ones of that shape, in the given type or the tensor's own."""
    inputs = torch_ops._get_inputs(context, node, min_expected=2)
    size = mb.concat(values=inputs[1], axis=0) if isinstance(inputs[1], list) and inputs[1] else inputs[1]
    dtype = inputs[2] if len(inputs) > 2 else None
    name = (
        types.builtin_to_string(inputs[0].dtype)
        if dtype is None
        else torch_ops.NUM_TO_DTYPE_STRING[dtype.val]
    )
    no_axes = isinstance(size, list) or size.shape == (0,)
    ones = mb.identity(x=1.0) if no_axes else mb.fill(shape=size, value=1.0)
    context.add(torch_ops._cast_to(ones, name, node.name), node.name)


def _boolean_only(operation: Callable[..., Any]) -> Callable[[Any, Any], None]:
    """`a | b` and `a ^ b` of boolean tensors; MIL has no such operation on the bits of integers."""

    def convert(context: Any, node: Any) -> None:
        x, y = torch_ops._get_inputs(context, node, expected=2)
        if x.dtype != types.bool or y.dtype != types.bool:
            raise NotImplementedError(f"{node.kind} of integers")
        context.add(operation(x=x, y=y, name=node.name), node.name)

    return convert


def _addcmul(context: Any, node: Any) -> None:
    """torch.addcmul(x, first, second, value=1): x + value * first * second."""
    inputs = torch_ops._get_inputs(context, node, min_expected=3)
    product = mb.mul(x=inputs[1], y=inputs[2])
    if len(inputs) > 3 and inputs[3] is not None:
        product = mb.mul(x=product, y=inputs[3])
    context.add(mb.add(x=inputs[0], y=product, name=node.name), node.name)


def _fake_quantize(context: Any, node: Any) -> None:
    """torch.fake_quantize_per_tensor_affine of 8 bits: MIL's quantize and dequantize (iOS 17)."""
    x, scale, zero_point, low, high = torch_ops._get_inputs(context, node, expected=5)
    dtype = {(-128, 127): "int8", (0, 255): "uint8"}.get((int(low.val), int(high.val)))
    if dtype is None:
        raise NotImplementedError(f"quantize to integers from {low.val} to {high.val}")
    step = np.float32(scale.val)
    zero = np.dtype(dtype).type(zero_point.val)
    offset = {"zero_point": zero} if zero else {}
    integers = mb.quantize(input=x, scale=step, output_dtype=dtype, **offset)
    context.add(mb.dequantize(input=integers, scale=step, name=node.name, **offset), node.name)


def _register_missing() -> None:
    """Operations that coremltools 9.0 has no translation for; a later version's own are left alone."""
    missing = {
        "addcmul": _addcmul,
        "fake_quantize_per_tensor_affine": _fake_quantize,
        "new_ones": _new_ones,
        "or": _boolean_only(mb.logical_or),
        "bitwise_or": _boolean_only(mb.logical_or),
        "xor": _boolean_only(mb.logical_xor),
        "bitwise_xor": _boolean_only(mb.logical_xor),
    }
    for name, function in missing.items():
        if converter_of(name) is None:
            _TORCH_OPS_REGISTRY.set_func_by_name(function, name)


def _repair_cast() -> None:
    """NumPy 2.4 refuses int(array of one element), which coremltools 9.0 relies on in `_cast`."""
    if VERSION != "9.0" or np.lib.NumpyVersion(np.__version__) < "2.4.0":
        return
    original = torch_ops._cast

    def cast(context: Any, node: Any, dtype: type, dtype_name: str) -> None:
        x = context[node.inputs[0]]
        value = x.val if x.can_be_folded_to_const() else None
        if isinstance(value, np.ndarray) and value.size == 1:
            context.add(mb.const(val=dtype(value.item()), name=node.name), node.name)
        else:
            original(context, node, dtype, dtype_name)

    torch_ops._cast = cast


_register_missing()
_repair_cast()
