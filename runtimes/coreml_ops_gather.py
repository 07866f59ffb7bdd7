"""MIL's gather and scatter families, and constants made when the program runs."""

from __future__ import annotations

import torch
from torch import Tensor

from edgecomp.runtimes.coreml_args import Table, ints


def _positive(indices: Tensor, extent: int) -> Tensor:
    """Indices as int64, negative ones counted from the end."""
    wide = indices.long()
    return torch.where(wide < 0, wide + extent, wide)


def gather(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | int = 0,
    batch_dims: Tensor | int = 0,
    validate_indices: Tensor | bool = False,
) -> Tensor:
    """x.shape[:axis] + indices.shape[batch_dims:] + x.shape[axis + 1:]."""
    dim, batch = int(axis) % x.dim(), int(batch_dims)
    places = _positive(indices, x.shape[dim])
    if batch == 0:
        picked = x.index_select(dim, places.reshape(-1))
        return picked.reshape(*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :])
    rows = x.reshape(-1, *x.shape[batch:])
    row_places = places.reshape(rows.shape[0], *indices.shape[batch:])
    picked = torch.stack([gather(r, p, dim - batch) for r, p in zip(rows, row_places, strict=True)])
    return picked.reshape(*x.shape[:batch], *picked.shape[1:])


def gather_along_axis(
    x: Tensor, indices: Tensor, axis: Tensor | int = 0, validate_indices: Tensor | bool = False
) -> Tensor:
    return torch.take_along_dim(x, _positive(indices, x.shape[int(axis)]), int(axis))


def gather_nd(
    x: Tensor, indices: Tensor, batch_dims: Tensor | int = 0, validate_indices: Tensor | bool = False
) -> Tensor:
    """Row i of the last axis of `indices` names a slice of `x`."""
    batch = int(batch_dims)
    if batch == 0:
        return x[_coordinates(x, indices)]
    rows = x.reshape(-1, *x.shape[batch:])
    row_places = indices.reshape(rows.shape[0], *indices.shape[batch:])
    picked = torch.stack([r[_coordinates(r, p)] for r, p in zip(rows, row_places, strict=True)])
    return picked.reshape(*x.shape[:batch], *picked.shape[1:])


def _coordinates(x: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    return tuple(_positive(c, x.shape[i]) for i, c in enumerate(indices.unbind(-1)))


_ACCUMULATE = {"mul": "prod", "max": "amax", "min": "amin"}


def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Tensor | int = 0,
    mode: str = "add",
    validate_indices: Tensor | bool = False,
) -> Tensor:
    dim = int(axis)
    places = _positive(indices, data.shape[dim])
    if mode == "update":
        return data.scatter(dim, places, updates)
    if mode in ("add", "sub"):
        return data.scatter_add(dim, places, updates if mode == "add" else -updates)
    if mode == "div":
        return data.scatter_reduce(dim, places, 1.0 / updates, "prod")
    return data.scatter_reduce(dim, places, updates, _ACCUMULATE[mode])


def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Tensor | int = 0,
    mode: str = "add",
    validate_indices: Tensor | bool = False,
) -> Tensor:
    """`indices` [C]; `updates` has C slices along `axis`."""
    dim = int(axis) % data.dim()
    shape = [1] * data.dim()
    shape[dim] = -1
    places = indices.reshape(shape).expand(updates.shape)
    return scatter_along_axis(data, places, updates, dim, mode)


def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: Tensor | bool = False
) -> Tensor:
    """Row i of the last axis of `indices` names the slice of `data` that `updates[i]` changes."""
    depth = indices.shape[-1]
    places = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for coordinate, extent in zip(_coordinates(data, indices), data.shape[:depth], strict=True):
        places = places * extent + coordinate
    rest = data.shape[depth:]
    flat = data.reshape(-1, *rest)
    changed = scatter(flat, places.reshape(-1), updates.reshape(-1, *rest), 0, mode)
    return changed.reshape(data.shape)


def non_zero(x: Tensor) -> Tensor:
    return x.nonzero()


def one_hot(
    indices: Tensor,
    one_hot_vector_size: Tensor,
    axis: Tensor | int = -1,
    on_value: Tensor | int = 1,
    off_value: Tensor | int = 0,
) -> Tensor:
    hot = indices.unsqueeze(-1) == torch.arange(int(one_hot_vector_size))
    hot = hot.movedim(-1, int(axis))
    return torch.where(hot, torch.as_tensor(on_value), torch.as_tensor(off_value))


def fill(shape: Tensor, value: Tensor | float = 0.0) -> Tensor:
    value = torch.as_tensor(value)
    return value.reshape([1] * shape.numel()).expand(ints(shape)).clone()


def fill_like(ref_tensor: Tensor, value: Tensor | float = 0.0) -> Tensor:
    return fill(torch.tensor(ref_tensor.shape, dtype=torch.int64), value)


def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item())


def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


def band_part(x: Tensor, lower: Tensor | int = -1, upper: Tensor | int = -1) -> Tensor:
    """Zeros outside the band (m - n <= lower, n - m <= upper); a negative bound keeps that side."""
    rows = torch.arange(x.shape[-2])[:, None]
    columns = torch.arange(x.shape[-1])
    keep = torch.ones(x.shape[-2:], dtype=torch.bool)
    if int(lower) >= 0:
        keep &= rows - columns <= int(lower)
    if int(upper) >= 0:
        keep &= columns - rows <= int(upper)
    return torch.where(keep, x, torch.zeros_like(x))


def identity(x: Tensor) -> Tensor:
    return x


OPS: Table = {
    "band_part": band_part,
    "fill": fill,
    "fill_like": fill_like,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "identity": identity,
    "non_zero": non_zero,
    "one_hot": one_hot,
    "range_1d": range_1d,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "shape": shape,
}
