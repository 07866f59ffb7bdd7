"""The weights of an `.mlpackage` as they are stored: bits per weight with scales, offsets or palettes."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from edgecomp.runtimes.coreml_package import Operation, Package
from edgecomp.spec import StoredWeight

FEWEST = 256


def read(package: Package) -> list[StoredWeight]:
    """Every weight of the program, in its order."""
    found = [_stored(o) for o in package.main.walk() if o.type == "const" or o.type.startswith("constexpr_")]
    return [w for w in found if w is not None and w.elements >= FEWEST]


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
