"""Several programs in one package: functions that share a file of weights and the model's states (iOS 18)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgecomp.exporters.coreml_toolkit import Model_pb2


def joined(specs: Mapping[str, Any]) -> Any:
    """One model of specs that each hold a function `main`, under the names given; the first is the default.

    A model of several functions describes each of them in `description.functions`, and none at its top
    (coremltools, `converters/mil/backend/mil/load.py`).
    """
    whole = Model_pb2.Model()
    default, first = next(iter(specs.items()))
    whole.CopyFrom(first)
    whole.specificationVersion = max(spec.specificationVersion for spec in specs.values())
    whole.mlProgram.ClearField("functions")
    for field in ("input", "output", "state"):
        whole.description.ClearField(field)
    for name, spec in specs.items():
        whole.mlProgram.functions[name].CopyFrom(spec.mlProgram.functions["main"])
        described = whole.description.functions.add(name=name)
        described.input.extend(spec.description.input)
        described.output.extend(spec.description.output)
        described.state.extend(spec.description.state)
    whole.description.defaultFunctionName = default
    return whole
