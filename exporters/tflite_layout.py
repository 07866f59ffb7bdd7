"""Permutation algebra of stored layouts: pure functions on tuples.

A layout is a tuple `perm`: axis i of the stored tensor is axis `perm[i]` of the torch tensor. NCHW stored as
NHWC is (0, 2, 3, 1). `permute` in the model only changes the tuple; data moves when an operation needs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Perm = tuple[int, ...]
Shape = tuple[int, ...]


def identity(rank: int) -> Perm:
    return tuple(range(rank))


def channels_last(rank: int) -> Perm:
    """(0, 2, ..., 1): the layout of TFLite's convolutions."""
    return (0, *range(2, rank), 1) if rank >= 3 else identity(rank)


def stored_shape(shape: Shape, perm: Perm) -> Shape:
    return tuple(shape[p] for p in perm)


def torch_shape(stored: Shape, perm: Perm) -> Shape:
    shape = [0] * len(perm)
    for axis, size in zip(perm, stored, strict=True):
        shape[axis] = size
    return tuple(shape)


def movement(source: Perm, target: Perm) -> Perm:
    """The TRANSPOSE that turns a tensor stored as `source` into one stored as `target`."""
    return tuple(source.index(axis) for axis in target)


def keeps_order(stored: Shape, move: Perm) -> bool:
    """Does the transpose only move axes of length 1? Then a RESHAPE does it."""
    moved = [axis for axis in move if stored[axis] != 1]
    return moved == sorted(moved)


def widened(perm: Perm, rank: int) -> Perm:
    """The layout after leading axes of length 1 were added, as broadcasting does."""
    extra = rank - len(perm)
    return (*range(extra), *(p + extra for p in perm))


def permuted(perm: Perm, dims: Sequence[int]) -> Perm:
    """The layout of `x.permute(dims)` when no data moves."""
    new_axis_of = {old: new for new, old in enumerate(dims)}
    return tuple(new_axis_of[p] for p in perm)


def groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of axes with equal products: which axes a reshape merges and splits.

    (1, 8, 4, 4) -> (1, 2, 4, 16): [([0], [0]), ([1], [1, 2]), ([2, 3], [3])]; axes of length 1 are left out.
    """
    left = [a for a, size in enumerate(before) if size != 1]
    right = [a for a, size in enumerate(after) if size != 1]
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        mine, theirs = [left[i]], [right[j]]
        i, j = i + 1, j + 1
        while (a := math.prod(before[k] for k in mine)) != (b := math.prod(after[k] for k in theirs)):
            if a < b:
                mine.append(left[i])
                i += 1
            else:
                theirs.append(right[j])
                j += 1
        found.append((mine, theirs))
    return found


def reshaped(before: Shape, perm: Perm, after: Shape) -> Perm | None:
    """The layout of `x.reshape(after)` when no data moves, or None when data has to.

    Possible when the axes of each merged or split group lie side by side and in order in the stored tensor.
    """
    position = {axis: i for i, axis in enumerate(perm)}
    ordered: list[tuple[int, list[int]]] = []
    big = [axis for axis in perm if before[axis] != 1]
    place = {axis: i for i, axis in enumerate(big)}
    for mine, theirs in groups(before, after):
        where = [place[a] for a in mine]
        if where != list(range(where[0], where[0] + len(where))):
            return None
        ordered.append((position[mine[0]], theirs))
    placed = [axis for _, theirs in sorted(ordered) for axis in theirs]
    return _with_unit_axes(placed, len(after))


def _with_unit_axes(placed: list[int], rank: int) -> Perm:
    """Insert the axes of length 1, each right after the axis that precedes it in torch's order."""
    result = list(placed)
    for axis in range(rank):
        if axis not in result:
            at = result.index(axis - 1) + 1 if axis > 0 else 0
            result.insert(at, axis)
    return tuple(result)
