"""MIL's operations that move, cut, join and pad values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgecomp.runtimes.coreml_args import Table, axes_of, ints


def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """-1 is inferred; 0 takes the input's dimension at the same place."""
    dims = [x.shape[i] if d == 0 else d for i, d in enumerate(ints(shape))]
    return x.reshape(dims)


def reshape_like(
    x: Tensor, ref_tensors: list[Tensor], begins: list[Tensor], ends: list[Tensor], end_masks: list[Tensor]
) -> Tensor:
    dims: list[int] = []
    for reference, begin, end, open_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        dims += reference.shape[int(begin) : None if bool(open_end) else int(end)]
    return x.reshape(dims)


def transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(ints(perm))


def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(a % rank for a in ints(axes)):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(ints(axes))


def flatten2d(x: Tensor, axis: Tensor | int = 1) -> Tensor:
    head = x.shape[: int(axis)]
    return x.reshape(int(torch.tensor(head).prod()) if head else 1, -1)


def tile(x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(ints(reps))


def reverse(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.flip(axes_of(axes, x.dim()))


def reverse_sequence(
    x: Tensor, lengths: Tensor, seq_axis: Tensor | int = 0, batch_axis: Tensor | int = 0
) -> Tensor:
    rows = []
    for row, length in zip(x.split(1, int(batch_axis)), ints(lengths), strict=True):
        head = row.narrow(int(seq_axis), 0, length).flip(int(seq_axis))
        tail = row.narrow(int(seq_axis), length, row.shape[int(seq_axis)] - length)
        rows.append(torch.cat([head, tail], int(seq_axis)))
    return torch.cat(rows, int(batch_axis))


def concat(values: list[Tensor], axis: Tensor, interleave: Tensor | bool = False) -> Tensor:
    joined = torch.cat(values, int(axis))
    if not bool(interleave):
        return joined
    dim = int(axis) % values[0].dim()
    return torch.stack(values, dim + 1).reshape(joined.shape)


def stack(values: list[Tensor], axis: Tensor) -> Tensor:
    return torch.stack(values, int(axis))


def split(
    x: Tensor, axis: Tensor, num_splits: Tensor | None = None, split_sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    dim = int(axis)
    if split_sizes is not None:
        return x.split(ints(split_sizes), dim)
    return x.split(x.shape[dim] // int(num_splits), dim)  # type: ignore[arg-type]


def _slices(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None,
    begin_mask: Tensor | None,
    end_mask: Tensor | None,
    squeeze_mask: Tensor | None,
) -> list[list[int]]:
    """The indices that are taken along each axis, by the rules of Python's slices."""
    rank = x.dim()
    none = [0] * rank
    steps = ints(stride) if stride is not None else [1] * rank
    masks = [ints(m) if m is not None else none for m in (begin_mask, end_mask, squeeze_mask)]
    taken = []
    for axis, (first, last, step) in enumerate(zip(ints(begin), ints(end), steps, strict=True)):
        start = None if masks[0][axis] else first
        stop = None if masks[1][axis] or masks[2][axis] else last
        chosen = range(*slice(start, stop, step).indices(x.shape[axis]))
        taken.append(list(chosen[:1] if masks[2][axis] else chosen))
    return taken


def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    taken = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    for axis, indices in enumerate(taken):
        if indices != list(range(x.shape[axis])):
            x = x.index_select(axis, torch.tensor(indices, dtype=torch.int64))
    if squeeze_mask is None:
        return x
    return x.squeeze([axis for axis, drop in enumerate(ints(squeeze_mask)) if drop])


def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    for axis, (first, count) in enumerate(zip(ints(begin), ints(size), strict=True)):
        start = first % x.shape[axis] if first < 0 else first
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    taken = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    shape = [len(indices) for indices in taken]
    grid = torch.meshgrid(*(torch.tensor(i, dtype=torch.int64) for i in taken), indexing="ij")
    changed = x.clone()
    changed[grid] = update.to(x.dtype).reshape(shape)
    return changed


def pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Tensor | float = 0.0) -> Tensor:
    """`pad` lists (before, after) for the last len(pad) / 2 axes, first of them first."""
    amounts = ints(pad)
    pairs = list(zip(amounts[0::2], amounts[1::2], strict=True))
    if mode == "constant":
        flat = [amount for pair in reversed(pairs) for amount in pair]
        return F.pad(x, flat, value=float(constant_val))
    for axis, (before, after) in zip(range(x.dim() - len(pairs), x.dim()), pairs, strict=True):
        if before or after:
            x = x.index_select(axis, _edge_indices(x.shape[axis], before, after, mode))
    return x


def _edge_indices(extent: int, before: int, after: int, mode: str) -> Tensor:
    places = torch.arange(-before, extent + after)
    if mode == "replicate":
        return places.clamp(0, extent - 1)
    mirrored = places.abs()
    return torch.where(mirrored >= extent, 2 * (extent - 1) - mirrored, mirrored)


def sliding_windows(x: Tensor, axis: Tensor, size: Tensor, stride: Tensor | int = 1) -> Tensor:
    dim = int(axis) % x.dim()
    return x.unfold(dim, int(size), int(stride)).movedim(-1, dim + 1)


def depth_to_space(x: Tensor, block_size: Tensor) -> Tensor:
    """[n, b * b * c, H, W] -> [n, c, H * b, W * b], depth first (TensorFlow's order)."""
    n, channels, height, width = x.shape
    b = int(block_size)
    cubes = x.reshape(n, b, b, channels // (b * b), height, width)
    return cubes.permute(0, 3, 4, 1, 5, 2).reshape(n, channels // (b * b), height * b, width * b)


def space_to_depth(x: Tensor, block_size: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    b = int(block_size)
    cubes = x.reshape(n, channels, height // b, b, width // b, b)
    return cubes.permute(0, 3, 5, 1, 2, 4).reshape(n, channels * b * b, height // b, width // b)


def space_to_batch(x: Tensor, block_shape: Tensor, paddings: Tensor) -> Tensor:
    top, bottom, left, right = ints(paddings)
    x = F.pad(x, (left, right, top, bottom))
    n, channels, height, width = x.shape
    bh, bw = ints(block_shape)
    cubes = x.reshape(n, channels, height // bh, bh, width // bw, bw)
    return cubes.permute(3, 5, 0, 1, 2, 4).reshape(n * bh * bw, channels, height // bh, width // bw)


def batch_to_space(x: Tensor, block_shape: Tensor, crops: Tensor) -> Tensor:
    top, bottom, left, right = ints(crops)
    bh, bw = ints(block_shape)
    n, channels, height, width = x.shape
    cubes = x.reshape(bh, bw, n // (bh * bw), channels, height, width)
    whole = cubes.permute(2, 3, 4, 0, 5, 1).reshape(n // (bh * bw), channels, height * bh, width * bw)
    return whole[:, :, top : height * bh - bottom, left : width * bw - right]


def pixel_shuffle(x: Tensor, upscale_factor: Tensor) -> Tensor:
    return F.pixel_shuffle(x, int(upscale_factor))


def pixel_unshuffle(x: Tensor, downscale_factor: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, int(downscale_factor))


OPS: Table = {
    "batch_to_space": batch_to_space,
    "concat": concat,
    "depth_to_space": depth_to_space,
    "expand_dims": expand_dims,
    "flatten2d": flatten2d,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "reshape": reshape,
    "reshape_like": reshape_like,
    "reverse": reverse,
    "reverse_sequence": reverse_sequence,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "sliding_windows": sliding_windows,
    "space_to_batch": space_to_batch,
    "space_to_depth": space_to_depth,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
}
