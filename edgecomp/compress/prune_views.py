"""How labels pass through operations that only move values: reshapes, permutations, slices, joins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgecomp.compress.prune_labels import FIXED, Dims, Labels, labelled


def reshape(labels: Labels, dims: Dims, shape: Sequence[int], where: str, heads: Sequence[int] = ()) -> Dims:
    """Labels after a reshape. A prunable dimension survives when it stays whole, or is merged with or split
    from unlabelled ones only; a reshape that cuts through it locks it.

    `heads`: sizes that are numbers of attention heads. A dimension cut so that one part has such a size
    survives there: what belongs to one head lives and dies together.
    """
    result: Dims = []
    for before, after in _blocks([len(d) for d in dims], list(shape)):
        old, new = [dims[i] for i in before], [shape[i] for i in after]
        result.extend(_reshape_block(labels, old, new, where, heads))
    return result


def _blocks(old: list[int], new: list[int]) -> list[tuple[list[int], list[int]]]:
    """The finest pairing of runs of old and new dimensions whose sizes have equal products."""
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        before, after = [], []
        have, want = 1, 1
        if i < len(old):
            have *= old[i]
            before.append(i)
            i += 1
        if j < len(new):
            want *= new[j]
            after.append(j)
            j += 1
        while have != want:
            if have < want:
                have *= old[i]
                before.append(i)
                i += 1
            else:
                want *= new[j]
                after.append(j)
                j += 1
        blocks.append((before, after))
    return blocks


def _reshape_block(
    labels: Labels, dims: Dims, shape: list[int], where: str, heads: Sequence[int] = ()
) -> Dims:
    if len(dims) == 1 and len(shape) == 1:
        return dims
    carrying = [d for d in dims if labelled(d)]
    if len(carrying) > 1:
        for dim in carrying:
            labels.lock(dim, f"two prunable dimensions are merged at {where}")
        return [np.full(n, FIXED) for n in shape]
    flat = _flatten(dims)
    if not (flat != FIXED).any():
        return [np.full(n, FIXED) for n in shape]
    roots = labels.roots(flat).reshape(shape)
    spread = flat.reshape(shape)
    for axis, size in enumerate(shape):
        rows = np.moveaxis(roots, axis, 0).reshape(size, -1)
        if (rows == rows[:, :1]).all():
            result = [np.full(n, FIXED) for n in shape]
            result[axis] = np.moveaxis(spread, axis, 0).reshape(size, -1)[:, 0]
            return result
    for axis, size in enumerate(shape):
        if size > 1 and size in heads:
            return _by_head(labels, spread, axis, where)
    parts = [axis for axis, size in enumerate(shape) if size > 1]
    if len(parts) == 2 and len(dims) == 1:
        return _by_part(labels, spread, parts[1], where)
    labels.lock(flat, f"is cut into {' x '.join(map(str, shape))} at {where}")
    return [np.full(n, FIXED) for n in shape]


def _by_part(labels: Labels, spread: np.ndarray, axis: int, where: str) -> Dims:
    """Channels cut into equal parts, as for a shuffle or for weights of several paths: the k-th of each part
    live and die together. Code that writes the width as a number fails when the group is tried."""
    rows = np.moveaxis(spread, axis, -1).reshape(-1, spread.shape[axis])
    for row in rows[1:]:
        labels.unite(rows[0], row, where)
    result = [np.full(n, FIXED) for n in spread.shape]
    result[axis] = rows[0]
    return result


def _by_head(labels: Labels, spread: np.ndarray, axis: int, where: str) -> Dims:
    rows = np.moveaxis(spread, axis, 0).reshape(spread.shape[axis], -1)
    for column in rows.T[1:]:
        labels.unite(rows[:, 0], column, where)
    result = [np.full(n, FIXED) for n in spread.shape]
    result[axis] = rows[:, 0]
    return result


def _flatten(dims: Dims) -> np.ndarray:
    """Label of each position of merged dimensions: that of the one dimension that carries labels."""
    sizes = [len(d) for d in dims]
    flat = np.full(math.prod(sizes), FIXED)
    for axis, dim in enumerate(dims):
        if labelled(dim) or (math.prod(sizes) == len(dim) and (dim != FIXED).any()):
            shape = [1] * len(sizes)
            shape[axis] = len(dim)
            flat = np.broadcast_to(dim.reshape(shape), sizes).reshape(-1).copy()
    return flat


def broadcast(labels: Labels, operands: Sequence[Dims], where: str) -> Dims:
    """Labels of an elementwise result: equal where operands have equal size, taken over where one is 1."""
    rank = max(len(dims) for dims in operands)
    result: Dims = []
    for axis in range(rank):
        here: np.ndarray | None = None
        for dims in operands:
            at = axis - (rank - len(dims))
            if at < 0:
                continue
            dim = dims[at]
            if here is None or (len(here) == 1 and len(dim) > 1):
                here = dim
            elif len(dim) == len(here):
                here = labels.unite(here, dim, where) if len(dim) > 1 else here
        result.append(here if here is not None else np.full(1, FIXED))
    return result


def concatenate(labels: Labels, operands: Sequence[Dims], axis: int, where: str) -> Dims:
    """Labels after `cat`: joined along the axis, made equal along the others."""
    axis %= len(operands[0])
    result: Dims = []
    for at in range(len(operands[0])):
        if at == axis:
            result.append(np.concatenate([dims[at] for dims in operands]))
            continue
        here = operands[0][at]
        for dims in operands[1:]:
            here = labels.unite(here, dims[at], where)
        result.append(here)
    return result


def chunk(labels: Labels, dims: Dims, count: int, axis: int, where: str) -> list[Dims]:
    """Labels of `chunk`'s parts. Equal parts shrink alike; unequal ones lock the dimension."""
    axis %= len(dims)
    width = math.ceil(len(dims[axis]) / count)
    parts = [dims[axis][i : i + width] for i in range(0, len(dims[axis]), width)]
    if labelled(dims[axis]):
        if all(len(p) == width for p in parts) and len(parts) == count:
            for part in parts[1:]:
                labels.unite(parts[0], part, where)
        else:
            labels.lock(dims[axis], f"is cut into unequal parts at {where}")
    return [[*dims[:axis], part, *dims[axis + 1 :]] for part in parts]
