"""The weights of an `.mlpackage` as they are stored: bits per weight with scales, offsets or palettes."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from edgecomp.runtimes.coreml_package import Name, Operation, Package
from edgecomp.spec import StoredWeight

FEWEST = 256


def read(package: Package) -> list[StoredWeight]:
    """Every weight of the program, in its order; integers and the scales that restore them are one."""
    found: dict[str, StoredWeight] = {}
    for operation in package.main.walk():
        if operation.type != "const" and not operation.type.startswith("constexpr_"):
            continue
        made = _stored(operation)
        if made is None:
            continue
        used = [p.value for values in operation.inputs.values() for p in values if isinstance(p, Name)]
        for integers in (found[n] for n in used if n in found and found[n].elements == made.elements):
            del found[integers.name]
            made = StoredWeight(made.name, made.elements, integers.dtype, made.bytes + integers.bytes)
        found[made.name] = made
    return [w for w in found.values() if w.elements >= FEWEST]


def _stored(operation: Operation) -> StoredWeight | None:
    arrays = [p for values in operation.inputs.values() for p in values if isinstance(p, np.ndarray)]
    if not arrays or not operation.outputs:
        return None
    name, made = operation.outputs[0]
    elements = math.prod(int(d) for d in made.shape)
    if operation.type == "const":
        return StoredWeight(name, elements, made.dtype, sum(a.nbytes for a in arrays))
    bits = re.search(r"\d+$", operation.stored)
    if bits is None:
        return None
    narrow = {"data", "indices", "quantized_data", "nonzero_data", "offset"}
    total = sum(_bits(key, part, narrow, int(bits[0])) for key, v in operation.inputs.items() for part in v)
    return StoredWeight(name, elements, operation.stored, -(-total // 8))


def _bits(key: str, part: Any, narrow: set[str], bits: int) -> int:
    if not isinstance(part, np.ndarray):
        return 0
    return part.size * bits if key in narrow else part.nbytes * 8
