"""The weights of a converted program: which constants are weights, of what, and how they are replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecomp.exporters.coreml_blob import BlobWriter, float_array, immediate_array, stored_bytes, value_of
from edgecomp.spec import Problem

# (operation, parameter) -> axis of the output channels of that weight.
_CHANNEL_AXIS = {
    ("conv", "weight"): 0,
    ("conv_transpose", "weight"): 1,
    ("linear", "weight"): 0,
    ("gather", "x"): 0,
    ("gru", "weight_hh"): 0,
    ("gru", "weight_ih"): 0,
    ("lstm", "weight_hh"): 0,
    ("lstm", "weight_hh_back"): 0,
    ("lstm", "weight_ih"): 0,
    ("lstm", "weight_ih_back"): 0,
    ("rnn", "weight_hh"): 0,
    ("rnn", "weight_ih"): 0,
}


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant that layers use as their weight. `array` float16 or float32; `axis`: output channels."""

    name: str
    module: str
    layers: tuple[str, ...]
    axis: int
    array: np.ndarray

    def problem(self, reason: str) -> Problem:
        return Problem("/".join(sorted(set(self.layers))), self.module, reason)


Replace = Callable[[Weight, BlobWriter, Any], "list[Any] | Problem"]
"""(weight, file, the const operation) -> the operations that stand in its place, or why it stays."""


def rewrite(
    spec: Any,
    weights: bytes,
    replace: Replace | None,
    modules: Mapping[str, str],
    notes: list[Problem],
    writer: BlobWriter | None = None,
) -> tuple[bytes, list[Problem]]:
    """Replace weights of the program in place; returns the new `weight.bin` and what stayed as it was.

    `notes` takes what was changed in another way than asked. `writer`: of a file that several programs share.
    `modules`: name of a constant as coremltools spells it -> the parameter or module it comes from.
    """
    writer = BlobWriter() if writer is None else writer
    skipped: list[Problem] = []

    def keep(operation: Any) -> Any:
        problem = _make_finite(operation, weights, writer, modules)
        if problem:
            notes.append(problem)
        else:
            _move(operation, weights, writer)
        return operation

    def rewrite_block(block: Any) -> None:
        uses = _uses(block)
        operations = []
        for operation in block.operations:
            for inner in operation.blocks:
                rewrite_block(inner)
            weight = _weight(operation, uses, weights, modules) if replace else None
            result = replace(weight, writer, operation) if weight and replace else None
            if replace and not weight:
                result = _other(operation, uses, weights, modules)
            if isinstance(result, Problem):
                skipped.append(result)
            operations += result if isinstance(result, list) else [keep(operation)]
        kept = [type(o).FromString(o.SerializeToString()) for o in operations]
        del block.operations[:]
        block.operations.extend(kept)

    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            rewrite_block(block)
    return writer.content(), skipped


def _uses(block: Any) -> dict[str, list[tuple[Any, str]]]:
    """Value name -> (operation, parameter) that read it, in nested blocks too."""
    found: dict[str, list[tuple[Any, str]]] = {}
    pending = [block]
    while pending:
        current = pending.pop()
        for operation in current.operations:
            pending += operation.blocks
            for parameter, argument in operation.inputs.items():
                for binding in argument.arguments:
                    if binding.WhichOneof("binding") == "name":
                        found.setdefault(binding.name, []).append((operation, parameter))
    return found


def _weight(
    operation: Any, uses: dict[str, list[tuple[Any, str]]], weights: bytes, modules: Mapping[str, str]
) -> Weight | None:
    if operation.type != "const":
        return None
    array = float_array(operation.attributes["val"], weights)
    name = operation.outputs[0].name
    users = uses.get(name, [])
    axes = {_axis(user, parameter, array) for user, parameter in users}
    if array is None or len(axes) != 1 or None in axes:
        return None
    axis = next(iter(axes))
    return Weight(name, modules.get(name, name), tuple(u.type for u, _ in users), axis, array)  # type: ignore[arg-type]


_NOTABLE = 1024
"""Elements from which a float constant that is no layer's weight is listed."""


def _other(
    operation: Any, uses: dict[str, list[tuple[Any, str]]], weights: bytes, modules: Mapping[str, str]
) -> Problem | None:
    """A large constant that stays float because no layer uses it as its weight (a position embedding)."""
    array = float_array(operation.attributes["val"], weights) if operation.type == "const" else None
    if array is None or array.size < _NOTABLE:
        return None
    name = operation.outputs[0].name
    users = "/".join(sorted({user.type for user, _ in uses.get(name, [])}))
    return Problem(
        users or "const", modules.get(name, name), f"{array.size} values that no layer has as its weight"
    )


def _axis(user: Any, parameter: str, array: np.ndarray | None) -> int | None:
    if user.type == "matmul" and array is not None and array.ndim == 2:
        return 1 if parameter == "y" else 0
    return _CHANNEL_AXIS.get((user.type, parameter))


_LARGE = {np.dtype(np.float16): 3e4, np.dtype(np.float32): 1e30}
"""Stands for infinity: far beyond any attention score, and finite after a score is added to it."""


def _make_finite(
    operation: Any, weights: bytes, writer: BlobWriter, modules: Mapping[str, str]
) -> Problem | None:
    """Replace infinities of a constant (masks hold -inf), which Apple's Neural Engine turns into NaN."""
    if operation.type != "const":
        return None
    value = operation.attributes["val"]
    array = float_array(value, weights)
    array = immediate_array(value) if array is None else array
    if array is None or bool(np.all(np.isfinite(array))):
        return None
    large = _LARGE[array.dtype]
    finite = np.nan_to_num(array, nan=np.nan, posinf=large, neginf=-large).astype(array.dtype)
    value.CopyFrom(value_of(writer, finite, value.type.tensorType.dataType))
    name = operation.outputs[0].name
    return Problem("const", modules.get(name, name), f"infinite values are stored as {large:g}")


def _move(operation: Any, weights: bytes, writer: BlobWriter) -> None:
    """Copy every tensor that an operation keeps in the old file to the new one."""
    values = list(operation.attributes.values())
    values += [
        b.value for a in operation.inputs.values() for b in a.arguments if b.WhichOneof("binding") == "value"
    ]
    for value in values:
        if value.WhichOneof("value") == "blobFileValue":
            tensor = value.type.tensorType
            count = int(np.prod([d.constant.size for d in tensor.dimensions], dtype=np.int64))
            data = stored_bytes(weights, value.blobFileValue.offset)
            value.blobFileValue.offset = writer.add(data, tensor.dataType, count)
