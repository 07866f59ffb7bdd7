"""A torch module -> a Core ML program: trace, else export, then coremltools' conversion."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp.errors import ModelError
from edgecomp.exporters.coreml_toolkit import (
    ConversionError,
    ScopeSource,
    conversion,
    converter_of,
    ct,
    first_line,
    quiet,
    torchscript_nodes,
)
from edgecomp.spec import Batch, Problem, TensorSpec

_NO_TRANSLATION = "coremltools has no translation for it"


@dataclass(frozen=True)
class Conversion:
    """What is asked of coremltools. `states`: names of buffers that keep their value between calls."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str
    deployment_target: str
    states: tuple[str, ...] = ()


def examples(inputs: Sequence[TensorSpec], batch: Batch | None) -> tuple[Tensor, ...]:
    """Tensors to trace with: the first sample, else seeded noise and for integers ones and zeros.

    A sample whose shapes differ from `inputs` (another batch size) is cut to the first rows.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, spec in enumerate(inputs):
        dtype = getattr(torch, spec.dtype)
        if batch is not None and tuple(batch.inputs[index].shape[1:]) == spec.shape[1:]:
            made.append(torch.from_numpy(np.array(batch.inputs[index][: spec.shape[0]])).to(dtype))
        elif dtype.is_floating_point:
            made.append(torch.randn(spec.shape, generator=generator).to(dtype))
        else:
            made.append((torch.arange(1, int(np.prod(spec.shape)) + 1) % 2).reshape(spec.shape).to(dtype))
    return tuple(made)


def prepare(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose tensors need no gradient."""
    with quiet():  # copying a graph module warns of what torch itself calls
        copied = copy.deepcopy(module).eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    return copied


def trace(module: nn.Module, example: tuple[Tensor, ...]) -> Any:
    """`torch.jit.trace` without its warnings. Raises what tracing raises."""
    with quiet(), torch.no_grad():
        return torch.jit.trace(module, example, check_trace=False, strict=False)


def door_dtype(dtype: str, bytes_pass: bool) -> str:
    """What Core ML takes and gives for a torch dtype: float32, int32; int8 where `bytes_pass` (iOS 26)."""
    if dtype.startswith("float"):
        return "float32"
    return "int8" if bytes_pass and dtype == "int8" else "int32"


def outputs_of(
    module: nn.Module, example: tuple[Tensor, ...], bytes_pass: bool = False
) -> tuple[TensorSpec, ...]:
    """What the module returns: `output`, or `output_0`, `output_1`, ... when it returns several tensors."""
    with torch.no_grad():
        result = module(*example)
    tensors = [result] if isinstance(result, Tensor) else result
    if not isinstance(tensors, tuple | list) or not all(isinstance(t, Tensor) for t in tensors):
        raise ModelError(
            f"{type(module).__name__} returns {type(result).__name__}; Core ML takes a tensor or a tuple of "
            "tensors: wrap the model in a module that returns these"
        )
    names = ["output"] if len(tensors) == 1 else [f"output_{i}" for i in range(len(tensors))]
    return tuple(
        TensorSpec(n, tuple(t.shape), door_dtype(str(t.dtype).removeprefix("torch."), bytes_pass))
        for n, t in zip(names, tensors, strict=True)
    )


def unsupported(module: nn.Module, example: tuple[Tensor, ...]) -> list[Problem]:
    """Operations that coremltools cannot translate, each with its module's name; [] when one way works."""
    try:
        found = _unsupported_in_trace(module, example)
    except Exception as error:
        found = [Problem("torch.jit.trace", "", f"the module cannot be traced: {first_line(error)}")]
    if not found:
        return []
    try:
        return _unsupported_in_export(module, example)
    except Exception:
        return found


def _unsupported_in_trace(module: nn.Module, example: tuple[Tensor, ...]) -> list[Problem]:
    found = {}
    for node in torchscript_nodes(trace(module, example)):
        kind = node.kind()
        if converter_of(kind) is None and not kind.startswith("prim::"):
            path = node.scopeName().rpartition("/")[2].partition("::")[0].removeprefix("__module.")
            found[kind, path] = Problem(kind, path, _NO_TRANSLATION)
    return list(found.values())


def _unsupported_in_export(module: nn.Module, example: tuple[Tensor, ...]) -> list[Problem]:
    with quiet():
        nodes = _exported(module, example).graph.nodes
    found = {}
    for node in nodes:
        if node.op == "call_function" and converter_of(node.target.__name__) is None:
            kind, stack = str(node.target), node.meta.get("nn_module_stack")
            path = list(stack.values())[-1][0] if stack else ""
            found[kind, path] = Problem(kind, path, _NO_TRANSLATION)
    return list(found.values())


def constant_names(program: Any, module: nn.Module) -> dict[str, str]:
    """Name of every constant of a converted program -> the parameter it was (`fc.weight`).

    A constant that coremltools computed (a convolution with the batch normalization folded in) has the name
    of the module that it comes from instead.
    """
    tensors = [n for n, _ in module.named_parameters()] + [n for n, _ in module.named_buffers()]
    plain = {"".join(c if c.isalnum() else "_" for c in n): n for n in tensors}
    found = {}
    for operation in _operations(program._mil_program.functions["main"]):
        if operation.op_type == "const":
            name = operation.outputs[0].name
            path = operation.scopes.get(ScopeSource.TORCHSCRIPT_MODULE_NAME, [])[:-1]
            stem = name.removeprefix("var_").removesuffix("_to_fp16")
            exported = stem.partition("_")[2]  # torch.export lifts parameters as p_..., buffers as b_...
            found[name] = plain.get(stem) or plain.get(exported) or ".".join(path) or name
    return found


def _operations(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def convert(module: nn.Module, example: tuple[Tensor, ...], wanted: Conversion) -> Any:
    """A `coremltools` ML program of the module, not loaded. Raises ModelError with both tries' causes."""
    causes = []
    for attempt in (_from_trace, _from_export):
        try:
            return conversion(partial(attempt, module, example, wanted))
        except ConversionError as error:
            causes.append(f"{attempt.__name__.removeprefix('_from_')}: {first_line(error)}")
    raise ModelError(
        f"{type(module).__name__} cannot be converted to Core ML ({'; '.join(causes)}); replace the "
        "operation that is named, or give a module whose shapes and control flow do not depend on data"
    )


def _from_trace(module: nn.Module, example: tuple[Tensor, ...], wanted: Conversion) -> Any:
    return _call(trace(module, example), wanted, [_input(s) for s in wanted.inputs], _states(module, wanted))


def _from_export(module: nn.Module, example: tuple[Tensor, ...], wanted: Conversion) -> Any:
    return _call(_exported(module, example), wanted, [_input(s) for s in wanted.inputs], None)


def _exported(module: nn.Module, example: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        return torch.export.export(module, example, strict=False).run_decompositions({})


def _call(program: Any, wanted: Conversion, inputs: list[Any], states: list[Any] | None) -> Any:
    outputs = [ct.TensorType(name=o.name, dtype=np.dtype(o.dtype).type) for o in wanted.outputs]
    return ct.convert(
        program,
        source="pytorch",
        convert_to="mlprogram",
        inputs=inputs,
        outputs=outputs,
        states=states,
        compute_precision=getattr(ct.precision, wanted.precision.upper()),
        minimum_deployment_target=getattr(ct.target, wanted.deployment_target),
        skip_model_load=True,
    )


def _input(spec: TensorSpec) -> Any:
    return ct.TensorType(name=spec.name, shape=spec.shape, dtype=np.dtype(spec.dtype).type)


def _states(module: nn.Module, wanted: Conversion) -> list[Any] | None:
    buffers = dict(module.named_buffers())
    found = [
        ct.StateType(ct.TensorType(shape=tuple(buffers[n].shape), dtype=np.float16), name=n)
        for n in wanted.states
    ]
    return found or None
