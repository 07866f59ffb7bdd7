"""Core ML itself, through coremltools, on a Mac."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgecomp.runtimes.coreml_package import Package
from edgecomp.runtimes.coreml_proto import coremltools
from edgecomp.spec import OpPlacement, TensorSpec

_PLACES = {
    "MLCPUComputeDevice": "cpu",
    "MLGPUComputeDevice": "gpu",
    "MLNeuralEngineComputeDevice": "neural engine",
}


class AppleSession:
    """An opened package, compiled and run by the operating system. States last as long as the session."""

    def __init__(self, package: Package) -> None:
        self.package = package
        self._model = coremltools.models.MLModel(str(package.path), compute_units=coremltools.ComputeUnit.ALL)
        self._state = self._model.make_state() if package.states else None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.package.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.package.outputs

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        given = {s.name: np.asarray(a, dtype=s.dtype) for s, a in zip(self.inputs, arrays, strict=True)}
        found = self._model.predict(given) if self._state is None else self._model.predict(given, self._state)
        return [np.asarray(found[o.name], dtype=o.dtype).reshape(o.shape) for o in self.outputs]

    def placement(self) -> list[OpPlacement]:
        """Where Core ML plans to run each operation (cpu, gpu, neural engine); "" where it does not say."""
        plan = coremltools.models.compute_plan.MLComputePlan.load_from_path(
            path=self._model.get_compiled_model_path(), compute_units=coremltools.ComputeUnit.ALL
        )
        block = plan.model_structure.program.functions["main"].block
        placed = []
        for operation in block.operations:
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            device = type(usage.preferred_compute_device).__name__ if usage else ""
            name = operation.outputs[0].name if operation.outputs else ""
            kind = operation.operator_name.rpartition(".")[2]
            if kind != "const":
                placed.append(OpPlacement(name, kind, _PLACES.get(device, "")))
        return placed
