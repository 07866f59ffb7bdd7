"""Weights of a MIL program: each with the operation that uses it and the type that it is stored in."""

from __future__ import annotations

from collections import Counter

import numpy as np

from edgecomp.runtimes.coreml_package import Block, Name, Operation
from edgecomp.spec import OpPlacement

# Operation -> the parameter that is its weight.
_WEIGHT = {"conv": "weight", "conv_transpose": "weight", "linear": "weight", "gather": "x"}


def weights(main: Block) -> list[OpPlacement]:
    """One row for each operation with a constant weight, in order; `dtype`: as stored, compressed or not."""
    return [OpPlacement(label, op.type, "", dtype) for label, op, dtype in _weighted(main)]


def results(main: Block) -> dict[str, str]:
    """What `weights` names -> the value that the operation gives, by its name in the program."""
    return {label: op.outputs[0][0] for label, op, _ in _weighted(main)}


def _weighted(main: Block) -> list[tuple[str, Operation, str]]:
    """(label, operation, stored type of its weight), in order of execution."""
    makers = {name: op for op in main.walk() for name, _ in op.outputs}
    count: Counter[str] = Counter()
    rows = []
    for op in main.walk():
        found = _weight(op, makers)
        if found is None:
            continue
        shape, dtype = found
        label = f"{op.type} {'x'.join(map(str, shape))}"
        count[label] += 1
        rows.append((f"{label} #{count[label]}", op, dtype))
    return rows


def _weight(op: Operation, makers: dict[str, Operation]) -> tuple[tuple[int, ...], str] | None:
    """Shape and stored type of the weight that an operation uses; None where it has none that is constant."""
    bound = op.inputs.get(_WEIGHT.get(op.type, ""), ())
    if len(bound) != 1:
        return None
    given = bound[0]
    if isinstance(given, np.ndarray):
        return given.shape, given.dtype.name
    maker = makers.get(given.value) if isinstance(given, Name) else None
    if maker is None or not (maker.type == "const" or maker.type.startswith("constexpr_")):
        return None
    kind = maker.outputs[0][1]
    return tuple(kind.shape), maker.stored or kind.dtype
