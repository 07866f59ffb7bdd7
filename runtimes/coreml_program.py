"""Runs a MIL program with torch, one operation after the other.

Arithmetic is float32. A value that the program types float16 is rounded to float16 after the operation
that makes it (`rounds=True`), or kept in float32 (`rounds=False`: the exact graph). Accumulation inside one
operation is float32 in both, which is what Apple's GPU and CPU paths do and an upper bound for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgecomp.errors import ArtifactError
from edgecomp.runtimes import coreml_constexpr
from edgecomp.runtimes.coreml_ops import OPS, TUPLE_PARAMETERS
from edgecomp.runtimes.coreml_package import DAMAGE, Block, Constant, Name, Operation, Package
from edgecomp.runtimes.coreml_values import Type

Value = Any
"""A torch tensor, or a str."""

_CONTROL = {"cond", "while_loop", "read_state", "write_state"}
_HELD = {
    "float16": torch.float32, "float32": torch.float32, "float64": torch.float32, "bool": torch.bool,
    "int8": torch.int8, "uint8": torch.uint8, "int16": torch.int32, "uint16": torch.int32,
    "int32": torch.int32, "uint32": torch.int64, "int64": torch.int64, "uint64": torch.int64,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Step:
    """A call that is ready to run: constants are bound, names are looked up when it runs."""

    operation: Operation
    function: Callable[..., Any]
    constants: Mapping[str, Value]
    names: Mapping[str, str | tuple[str, ...]]
    blocks: tuple[_Steps, ...] = ()


@dataclass(frozen=True, eq=False)
class _Steps:
    block: Block
    steps: tuple[_Step, ...]


class Program:
    """An executable program. `states` hold their values between calls, until `reset_states`."""

    def __init__(self, package: Package, *, rounds: bool) -> None:
        refuse_unknown(package)
        self._package = package
        self._rounds = rounds
        self._constants: dict[str, Value] = {}
        self._decoded: dict[str, np.ndarray] = {}
        try:
            self._main = self._prepare(package.main)
        except DAMAGE as error:
            raise ArtifactError(f"{package.path} is damaged ({error!r}); export the model again") from error
        self._last_use = _last_uses(package.main)
        self.states: dict[str, Tensor] = {}
        self.reset_states()

    def reset_states(self) -> None:
        """Set every state to zeros, as a new Core ML state is."""
        for name, found in self._package.states.items():
            self.states[name] = torch.zeros(found.shape, dtype=_HELD[found.dtype])

    def share_states(self, other: Program) -> None:
        """Keep the other program's states from now on, as functions of one model do."""
        self.states = other.states

    def run(self, inputs: Mapping[str, Tensor], *, keep: bool = False) -> dict[str, Value]:
        """Values by name: the outputs, or with `keep` every value that was computed."""
        values: dict[str, Value] = {}
        for name, tensor in inputs.items():
            values[name] = self._settle(tensor, self._package.input_types[name])
        with torch.inference_mode():
            self._run_block(self._main, values, None if keep else self._last_use)
        if keep:
            return values
        return {name: self._look_up(name, values) for name in self._package.main.outputs}

    def constant(self, name: str) -> Value:
        """A constant of the program by name, decoded. Raises KeyError."""
        return self._constants[name]

    def _prepare(self, block: Block) -> _Steps:
        steps = []
        for operation in block.operations:
            if operation.type == "const":
                (value,) = operation.inputs["val"]
                if isinstance(value, Name):
                    raise ArtifactError(
                        f"constant {operation.name!r} refers to {value.value!r} for its value"
                    )
                self._constants[operation.outputs[0][0]] = self._hold(value, operation.outputs[0][1])
            elif operation.type.startswith("constexpr_"):
                self._decode(operation)
            else:
                steps.append(self._step(operation))
        return _Steps(block, tuple(steps))

    def _decode(self, operation: Operation) -> None:
        """Evaluate a compressed constant once, in NumPy, as the format defines it."""
        arguments = {k: self._raw(v[0]) for k, v in operation.inputs.items()}
        try:
            result = coreml_constexpr.OPS[operation.type](**arguments)
        except DAMAGE as error:
            raise ArtifactError(
                f"the compressed weight {operation.name!r} ({operation.type}) cannot be decoded: {error}"
            ) from error
        results = result if isinstance(result, tuple) else (result,)
        for (name, found), array in zip(operation.outputs, results, strict=True):
            if found.shape != array.shape:
                raise ArtifactError(
                    f"the compressed weight {name!r} decodes to shape {array.shape}; "
                    f"the program says {found.shape}"
                )
            self._decoded[name] = array
            self._constants[name] = self._hold(array, found)

    def _raw(self, binding: Name | Constant) -> Any:
        if not isinstance(binding, Name):
            return binding
        if binding.value in self._decoded:
            return self._decoded[binding.value]
        held = self._constants[binding.value]
        return held.numpy() if isinstance(held, Tensor) else held

    def _step(self, operation: Operation) -> _Step:
        constants: dict[str, Value] = {}
        names: dict[str, str | tuple[str, ...]] = {}
        for parameter, bindings in operation.inputs.items():
            many = parameter in TUPLE_PARAMETERS
            if all(not isinstance(b, Name) or b.value in self._constants for b in bindings):
                held = [self._bound(b) for b in bindings]
                constants[parameter] = held if many else held[0]
            else:
                known = tuple(self._named(b, operation) for b in bindings)
                names[parameter] = known if many else known[0]
        return _Step(
            operation,
            OPS.get(operation.type, _never),
            constants,
            names,
            tuple(self._prepare(b) for b in operation.blocks),
        )

    def _bound(self, binding: Name | Constant) -> Value:
        if isinstance(binding, Name):
            return self._constants[binding.value]
        return self._hold(binding, None)

    def _named(self, binding: Name | Constant, operation: Operation) -> str:
        if isinstance(binding, Name):
            return binding.value
        name = f"{operation.name}.literal.{len(self._constants)}"
        self._constants[name] = self._hold(binding, None)
        return name

    def _hold(self, value: Constant, found: Type | None) -> Value:
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype == np.float16:
            value = value.astype(np.float32)
        dtype = _HELD.get(found.dtype) if found else None
        tensor = torch.from_numpy(np.array(value))
        held = dtype or _HELD.get(str(value.dtype), tensor.dtype)
        return tensor.to(held)

    def _look_up(self, name: str, values: Mapping[str, Value]) -> Value:
        found = values.get(name)
        return self._constants[name] if found is None else found

    def _run_block(
        self, block: _Steps, values: dict[str, Value], last_use: Mapping[int, Sequence[str]] | None
    ) -> None:
        for step in block.steps:
            operation = step.operation
            try:
                results = self._run_step(step, values)
                for (name, found), result in zip(operation.outputs, results, strict=True):
                    values[name] = self._settle(result, found)
            except (RuntimeError, *DAMAGE) as error:
                raise ArtifactError(
                    f"operation {operation.name!r} ({operation.type}) of the program cannot run: {error}"
                ) from error
            for name in last_use.get(id(operation), ()) if last_use else ():
                values.pop(name, None)

    def _run_step(self, step: _Step, values: dict[str, Value]) -> Sequence[Value]:
        arguments = dict(step.constants)
        for parameter, name in step.names.items():
            if isinstance(name, tuple):
                arguments[parameter] = [self._look_up(n, values) for n in name]
            elif name not in self.states:
                arguments[parameter] = self._look_up(name, values)
        if step.operation.type in _CONTROL:
            return self._run_control(step, arguments, values)
        result = step.function(**arguments)
        return result if isinstance(result, tuple | list) else (result,)

    def _run_control(
        self, step: _Step, arguments: Mapping[str, Value], values: dict[str, Value]
    ) -> Sequence[Value]:
        kind = step.operation.type
        if kind == "read_state":
            return (self.states[str(step.names["input"])].clone(),)
        if kind == "write_state":
            name = str(step.names["input"])
            self.states[name] = self._settle(arguments["data"], self._package.states[name]).clone()
            return ()
        if kind == "cond":
            chosen = step.blocks[0 if bool(arguments["pred"]) else 1]
            return self._run_nested(chosen, values, ())
        state = list(arguments["loop_vars"])
        condition, body = step.blocks
        while bool(self._run_nested(condition, values, state)[0]):
            state = list(self._run_nested(body, values, state))
        return state

    def _run_nested(
        self, block: _Steps, values: Mapping[str, Value], inputs: Sequence[Value]
    ) -> Sequence[Value]:
        inner = dict(values) | dict(zip(block.block.inputs, inputs, strict=True))
        self._run_block(block, inner, None)
        return [self._look_up(name, inner) for name in block.block.outputs]

    def _settle(self, value: Value, found: Type) -> Value:
        """Bring a result to the type that the program declares."""
        if not isinstance(value, Tensor):
            return value
        if found.dtype == "float16" and self._rounds:
            return value.to(torch.float16).to(torch.float32)
        held = _HELD.get(found.dtype)
        return value if held is None or value.dtype == held else value.to(held)


def _never(**_: Value) -> Value:
    raise ArtifactError("an operation without an implementation was reached")


def refuse_unknown(package: Package) -> None:
    """Raise ArtifactError naming every operation type that the executor does not know."""
    known = {"const", *OPS, *_CONTROL, *coreml_constexpr.OPS}
    unknown: dict[str, str] = {}
    for operation in package.main.walk():
        if operation.type not in known:
            unknown.setdefault(operation.type, operation.name)
    if unknown:
        listed = ", ".join(f"{kind} ({name!r})" for kind, name in sorted(unknown.items()))
        raise ArtifactError(
            f"{package.path} uses operations that the reference executor does not know: {listed}; "
            "run it on a Mac, or express the model without them"
        )


def _last_uses(block: Block) -> dict[int, list[str]]:
    """Operation (by id) -> names that no later operation of the block reads."""
    seen = set(block.outputs)
    last: dict[int, list[str]] = {}
    for operation in reversed(block.operations):
        used = set(_reads(operation)) - seen
        last[id(operation)] = sorted(used)
        seen |= used
    return last


def _reads(operation: Operation) -> Iterator[str]:
    for bindings in operation.inputs.values():
        for binding in bindings:
            if isinstance(binding, Name):
                yield binding.value
    for block in operation.blocks:
        yield from block.outputs
        for inner in block.operations:
            yield from _reads(inner)
