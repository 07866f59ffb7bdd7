"""MIL's reductions, sorting and cumulative sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgecomp.runtimes.coreml_args import Op, Table, axes_of


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Op:
    """A reduction over `axes` (default all); `function` takes the tensor, the axes and keep_dims."""

    def reduce(x: Tensor, axes: Tensor | None = None, keep_dims: Tensor | bool = False) -> Tensor:
        dims = axes_of(axes, x.dim())
        return function(x, dims, bool(keep_dims)) if dims else x

    return reduce


def _prod(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in reversed(dims):
        x = x.prod(dim, keepdim=keep)
    return x


def _log_sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return x.sum(dims, keepdim=keep).log()


def argmax(
    x: Tensor, axis: Tensor | int = -1, keep_dims: Tensor | bool = False, output_dtype: str = ""
) -> Tensor:
    return x.argmax(int(axis), keepdim=bool(keep_dims))


def argmin(
    x: Tensor, axis: Tensor | int = -1, keep_dims: Tensor | bool = False, output_dtype: str = ""
) -> Tensor:
    return x.argmin(int(axis), keepdim=bool(keep_dims))


def argsort(x: Tensor, axis: Tensor | int = -1, ascending: Tensor | bool = False) -> Tensor:
    return x.argsort(dim=int(axis), descending=not bool(ascending), stable=True)


def topk(
    x: Tensor,
    k: Tensor | int = 1,
    axis: Tensor | int = -1,
    ascending: Tensor | bool = False,
    sort: Tensor | bool = True,
    return_indices: Tensor | bool = True,
    output_indices_dtype: str = "",
) -> tuple[Tensor, ...] | Tensor:
    """The k largest (smallest when `ascending`) values and their indices, best first."""
    values, indices = x.sort(dim=int(axis), descending=not bool(ascending), stable=True)
    best = values.narrow(int(axis), 0, int(k)), indices.narrow(int(axis), 0, int(k))
    return best if bool(return_indices) else best[0]


def cumsum(
    x: Tensor, axis: Tensor | int = 0, exclusive: Tensor | bool = False, reverse: Tensor | bool = False
) -> Tensor:
    dim = int(axis)
    ordered = x.flip(dim) if bool(reverse) else x
    total = ordered.cumsum(dim)
    if bool(exclusive):
        total = total - ordered
    return total.flip(dim) if bool(reverse) else total


OPS: Table = {
    "reduce_argmax": argmax,
    "reduce_argmin": argmin,
    "reduce_l1_norm": _reduction(lambda x, d, k: x.abs().sum(d, keepdim=k)),
    "reduce_l2_norm": _reduction(lambda x, d, k: x.square().sum(d, keepdim=k).sqrt()),
    "reduce_log_sum": _reduction(_log_sum),
    "reduce_log_sum_exp": _reduction(lambda x, d, k: torch.logsumexp(x, d, keepdim=k)),
    "reduce_max": _reduction(lambda x, d, k: x.amax(d, keepdim=k)),
    "reduce_mean": _reduction(lambda x, d, k: x.mean(d, keepdim=k)),
    "reduce_min": _reduction(lambda x, d, k: x.amin(d, keepdim=k)),
    "reduce_prod": _reduction(_prod),
    "reduce_sum": _reduction(lambda x, d, k: x.sum(d, keepdim=k)),
    "reduce_sum_square": _reduction(lambda x, d, k: x.square().sum(d, keepdim=k)),
    "argsort": argsort,
    "cumsum": cumsum,
    "topk": topk,
}
