"""MIL's elementwise operations: unary, binary, logical, cast, select."""

from __future__ import annotations

import torch
from torch import Tensor

from edgecomp.runtimes.coreml_args import Op, Table

_DTYPES = {
    "fp16": torch.float32,  # rounded to float16 by the executor, where the program says so
    "fp32": torch.float32,
    "int32": torch.int32,
    "int16": torch.int32,  # held wide: torch has few kernels for 16-bit integers
    "int8": torch.int8,
    "uint16": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def cast(x: Tensor, dtype: str) -> Tensor:
    """Float to integer truncates towards zero."""
    return x.to(_DTYPES[dtype])


def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.clamp(x, min=alpha, max=beta)


def threshold(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.maximum(x, alpha)


def inverse(x: Tensor, epsilon: Tensor | float = 1e-4) -> Tensor:
    return 1.0 / (x + epsilon)


def log(x: Tensor, epsilon: Tensor | float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


def rsqrt(x: Tensor, epsilon: Tensor | float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


def floor_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")


def real_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.true_divide(x, y)


_UNARY: Table = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "round": torch.round,
    "sign": torch.sign,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}
_BINARY: Table = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": floor_div,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "real_div": real_div,
    "sub": torch.sub,
}


def _positional(function: Op, *names: str) -> Op:
    """torch's functions name their arguments otherwise: call them by position."""

    def call(**given: Tensor) -> Tensor:
        return function(*(given[name] for name in names))

    return call


OPS: Table = {
    **{name: _positional(function, "x") for name, function in _UNARY.items()},
    **{name: _positional(function, "x", "y") for name, function in _BINARY.items()},
    "cast": cast,
    "clip": clip,
    "inverse": inverse,
    "log": log,
    "rsqrt": rsqrt,
    "select": select,
    "threshold": threshold,
}
