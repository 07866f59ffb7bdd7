"""ATen operations that move values: reshape, slice, concatenate, gather, pad, resize."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from edgecomp.errors import UnsupportedOpError
from edgecomp.exporters.onnx_graph import Builder
from edgecomp.exporters.onnx_ops import NUMPY, argument, fake, lowers, operand

aten = torch.ops.aten


@lowers(aten.reshape.default, aten.view.default)
def reshape(b: Builder, node: Node) -> str:
    return b.op("Reshape", [b.take(node.args[0]), b.integers(list(fake(node).shape))])


@lowers(aten.permute.default)
def permute(b: Builder, node: Node) -> str:
    rank = fake(node).dim()
    return b.op("Transpose", [b.take(node.args[0])], perm=[d % rank for d in node.args[1]])


@lowers(aten.slice.Tensor)
def slice_(b: Builder, node: Node) -> str:
    dim, start, stop = (argument(node, i, d) for i, d in ((1, 0), (2, 0), (3, None)))
    step = argument(node, 4, 1)
    size = fake(node.args[0]).shape[dim]
    bounds = [start or 0, size if stop is None else min(stop, size), dim, step]
    starts, ends, axes, steps = (b.integers([v]) for v in bounds)
    return b.op("Slice", [b.take(node.args[0]), starts, ends, axes, steps])


@lowers(aten.select.int)
def select(b: Builder, node: Node) -> str:
    index = b.constant(node.args[2], np.int64)
    return b.op("Gather", [b.take(node.args[0]), index], axis=node.args[1])


@lowers(aten.split_with_sizes.default)
def split(b: Builder, node: Node) -> list[str]:
    sizes = list(node.args[1])
    return b.ops("Split", [b.take(node.args[0]), b.integers(sizes)], len(sizes), axis=argument(node, 2, 0))


@lowers(aten.cat.default)
def concatenate(b: Builder, node: Node) -> str:
    return b.op("Concat", [b.take(n) for n in node.args[0]], axis=argument(node, 1, 0))


@lowers(aten.expand.default)
def expand(b: Builder, node: Node) -> str:
    return b.op("Expand", [b.take(node.args[0]), b.integers(list(fake(node).shape))])


@lowers(aten.repeat.default)
def repeat(b: Builder, node: Node) -> str:
    source, times = b.take(node.args[0]), list(node.args[1])
    missing = len(times) - fake(node.args[0]).dim()
    if missing:
        source = b.op("Reshape", [source, b.integers([1] * missing + list(fake(node.args[0]).shape))])
    return b.op("Tile", [source, b.integers(times)])


@lowers(aten.constant_pad_nd.default)
def pad(b: Builder, node: Node) -> str:
    """PyTorch lists (before, after) from the last dimension; ONNX lists all befores, then all afters."""
    widths = list(node.args[1])
    rank = fake(node).dim()
    before, after = [0] * rank, [0] * rank
    for i in range(len(widths) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = widths[2 * i], widths[2 * i + 1]
    fill = b.constant(argument(node, 2, 0.0), NUMPY[fake(node).dtype])
    return b.op("Pad", [b.take(node.args[0]), b.integers(before + after), fill])


@lowers(aten.flip.default)
def flip(b: Builder, node: Node) -> str:
    dims = list(node.args[1])
    count = len(dims)
    bounds = [[-1] * count, [np.iinfo(np.int64).min + 1] * count, dims, [-1] * count]
    return b.op("Slice", [b.take(node.args[0]), *(b.integers(v) for v in bounds)])


@lowers(aten.roll.default)
def roll(b: Builder, node: Node) -> str:
    value = b.take(node.args[0])
    for shift, dim in zip(node.args[1], node.args[2], strict=True):
        size = fake(node).shape[dim]
        cut = -shift % size
        tail = b.op("Slice", [value, b.integers([cut]), b.integers([size]), b.integers([dim])])
        head = b.op("Slice", [value, b.integers([0]), b.integers([cut]), b.integers([dim])])
        value = b.op("Concat", [tail, head], axis=dim)
    return value


@lowers(aten.embedding.default)
def embedding(b: Builder, node: Node) -> str:
    return b.op("Gather", [b.take(node.args[0]), b.take(node.args[1])], axis=0)


@lowers(aten.index_select.default)
def index_select(b: Builder, node: Node) -> str:
    return b.op("Gather", [b.take(node.args[0]), b.take(node.args[2])], axis=node.args[1])


@lowers(aten.gather.default)
def gather(b: Builder, node: Node) -> str:
    return b.op("GatherElements", [b.take(node.args[0]), b.take(node.args[2])], axis=node.args[1])


@lowers(aten.index.Tensor)
def index(b: Builder, node: Node) -> str:
    """One index tensor on any axis is a Gather; several on the first axes are a GatherND."""
    positions = list(enumerate(node.args[1]))
    used = [(axis, i) for axis, i in positions if i is not None]
    if len(used) == 1:
        return b.op("Gather", [b.take(node.args[0]), b.take(used[0][1])], axis=used[0][0])
    if [axis for axis, _ in used] != list(range(len(used))):
        raise UnsupportedOpError(
            f"index of axes {[a for a, _ in used]} at {node.meta.get('module')!r}: several index tensors "
            "must take the first axes; permute the tensor before indexing"
        )
    shape = b.integers([*torch.broadcast_shapes(*(fake(i).shape for _, i in used)), 1])
    parts = [b.op("Expand", [_with_axis(b, i), shape]) for _, i in used]
    return b.op("GatherND", [b.take(node.args[0]), b.op("Concat", parts, axis=-1)])


def _with_axis(b: Builder, node: Any) -> str:
    return b.op("Unsqueeze", [b.take(node), b.integers([-1])])


@lowers(aten.where.self)
def where(b: Builder, node: Node) -> str:
    known = fake(node)
    return b.op("Where", [b.take(node.args[0]), *(operand(b, a, known) for a in node.args[1:3])])


@lowers(aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec)
def resize(b: Builder, node: Node) -> str:
    """Nearest: asymmetric and floor, as PyTorch's; bilinear: half_pixel or align_corners."""
    nearest = node.target is aten.upsample_nearest2d.vec
    corners = not nearest and bool(argument(node, 2, False))
    mode = "asymmetric" if nearest else ("align_corners" if corners else "half_pixel")
    factors = argument(node, 2 if nearest else 3)
    if factors is None or corners:
        size = ["", "", b.integers(list(fake(node).shape))]
    else:  # coordinates come from the factor as given, not from the rounded size
        size = ["", b.constant([1.0, 1.0, *factors], np.float32)]
    return b.op(
        "Resize", [b.take(node.args[0]), *size], mode="nearest" if nearest else "linear",
        coordinate_transformation_mode=mode, nearest_mode="floor" if nearest else None,
    )  # fmt: skip


@lowers(aten.pixel_shuffle.default)
def pixel_shuffle(b: Builder, node: Node) -> str:
    return b.op("DepthToSpace", [b.take(node.args[0])], blocksize=node.args[1], mode="CRD")


@lowers(aten.full.default, aten.full_like.default)
def full(b: Builder, node: Node) -> str:
    value = fake(node)
    return b.constant(np.full(tuple(value.shape), node.args[1], NUMPY[value.dtype]))


@lowers(aten.scalar_tensor.default)
def scalar_tensor(b: Builder, node: Node) -> str:
    return b.constant(node.args[0], NUMPY[fake(node).dtype])
