"""MIL's activations; formulas from coremltools' `mil/ops/defs/iOS15/activation.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgecomp.runtimes.coreml_args import Table, along


def clamped_relu(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """min(beta, x) where x >= 0, else min(beta, alpha * x)."""
    return torch.minimum(torch.where(x >= 0, x, alpha * x), beta)


def elu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x))


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


def linear_activation(x: Tensor, alpha: Tensor, beta: Tensor | float = 0.0) -> Tensor:
    return alpha * x + beta


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """`alpha` [C] along axis 1 of `x` [B, C, ...]."""
    return torch.where(x >= 0, x, along(alpha, 1, x.dim()) * x)


def relu(x: Tensor) -> Tensor:
    return torch.relu(x)


def relu6(x: Tensor) -> Tensor:
    return F.relu6(x)


def scaled_tanh(x: Tensor, alpha: Tensor | float = 1.0, beta: Tensor | float = 1.0) -> Tensor:
    return alpha * torch.tanh(beta * x)


def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def sigmoid_hard(x: Tensor, alpha: Tensor | float = 0.2, beta: Tensor | float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


def softmax(x: Tensor, axis: Tensor | int = -1) -> Tensor:
    return torch.softmax(x, int(axis))


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """alpha_c * log(1 + exp(beta_c * x_c)), channels on axis 1."""
    return along(alpha, 1, x.dim()) * softplus(along(beta, 1, x.dim()) * x)


def softsign(x: Tensor) -> Tensor:
    return F.softsign(x)


def thresholded_relu(x: Tensor, alpha: Tensor) -> Tensor:
    """x where x >= alpha, else 0."""
    return torch.where(x >= alpha, x, torch.zeros_like(x))


OPS: Table = {
    "clamped_relu": clamped_relu,
    "elu": elu,
    "gelu": gelu,
    "leaky_relu": leaky_relu,
    "linear_activation": linear_activation,
    "prelu": prelu,
    "relu": relu,
    "relu6": relu6,
    "scaled_tanh": scaled_tanh,
    "sigmoid": sigmoid,
    "sigmoid_hard": sigmoid_hard,
    "silu": silu,
    "softmax": softmax,
    "softplus": softplus,
    "softplus_parametric": softplus_parametric,
    "softsign": softsign,
    "thresholded_relu": thresholded_relu,
}
