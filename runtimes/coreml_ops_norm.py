"""MIL's normalizations; formulas from coremltools' `mil/ops/defs/iOS15/normalization.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgecomp.runtimes.coreml_args import Table, along, axes_of


def _affine(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """Scale and shift along axis 1."""
    x = x if gamma is None else x * along(gamma, 1, x.dim())
    return x if beta is None else x + along(beta, 1, x.dim())


def _standardize(x: Tensor, dims: list[int], epsilon: Tensor | float) -> Tensor:
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + epsilon)


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    centred = x - along(mean, 1, x.dim())
    return _affine(centred / torch.sqrt(along(variance, 1, x.dim()) + epsilon), gamma, beta)


def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Tensor | float = 1e-5
) -> Tensor:
    return _affine(_standardize(x, list(range(2, x.dim())), epsilon), gamma, beta)


def layer_norm(
    x: Tensor,
    axes: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    """`gamma` and `beta` have the shape of the normalized axes."""
    dims = axes_of(axes, x.dim())
    shape = [x.shape[d] if d in dims else 1 for d in range(x.dim())]
    normal = _standardize(x, dims, epsilon)
    normal = normal if gamma is None else normal * gamma.reshape(shape)
    return normal if beta is None else normal + beta.reshape(shape)


def l2_norm(x: Tensor, epsilon: Tensor | float = 1e-6) -> Tensor:
    """x / sqrt(sum of squares over the last three axes + epsilon)."""
    return x / torch.sqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


def local_response_norm(
    x: Tensor,
    size: Tensor,
    alpha: Tensor | float = 1e-4,
    beta: Tensor | float = 0.75,
    k: Tensor | float = 1.0,
) -> Tensor:
    return F.local_response_norm(x, int(size), float(alpha), float(beta), float(k))


OPS: Table = {
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "local_response_norm": local_response_norm,
}
