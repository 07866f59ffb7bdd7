"""Decoding of compressed constants (`constexpr_*` operations) with NumPy, exactly as Core ML defines them.

Source: coremltools' operation definitions, `mil/ops/defs/iOS16/constexpr_ops.py` and
`iOS18/compression.py`. Arithmetic is in the type of the scale or palette (float16 or float32), which is
the type of the result. Arguments are arrays; a result feeds the next `constexpr_*` op, so that a palette
of int8 inside a blockwise scale is followed to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgecomp.numerics import packing

Result = np.ndarray | tuple[np.ndarray, ...]


def affine_dequantize(
    quantized_data: np.ndarray, zero_point: np.ndarray, scale: np.ndarray, axis: np.ndarray
) -> np.ndarray:
    """scale * (quantized_data - zero_point), scale and zero point scalars or vectors along `axis`."""
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    wide = scale.reshape(shape) if scale.ndim else scale
    shift = zero_point.reshape(shape) if zero_point.ndim else zero_point
    centred = quantized_data.astype(np.float32) - shift.astype(np.float32)
    return (wide.astype(np.float32) * centred).astype(scale.dtype)


def blockwise_shift_scale(
    data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None
) -> np.ndarray:
    """scale * (data - offset); every scale covers a block of data.shape[i] / scale.shape[i] elements."""
    centred = data.astype(np.float32)
    if offset is not None:
        centred = centred - _spread(offset, data.shape).astype(np.float32)
    return (_spread(scale, data.shape).astype(np.float32) * centred).astype(scale.dtype)


def _spread(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    for axis, size in enumerate(shape):
        blocks = np.repeat(blocks, size // blocks.shape[axis], axis)
    return blocks


def cast(source_val: np.ndarray, output_dtype: str) -> np.ndarray:
    return source_val.astype({"fp32": np.float32, "fp16": np.float16}[output_dtype])


def lut_to_dense(
    indices: np.ndarray,
    lut: np.ndarray,
    shape: np.ndarray | None = None,
    vector_axis: np.ndarray | None = None,
) -> np.ndarray:
    """Palette lookup.

    iOS 16 form: `indices` are packed bytes, `lut` [2^bits], `shape` of the result. iOS 18 form: `indices` of
    rank K already have the shape of the result, `lut` is [g0, ..., gK-1, 2^bits, vector]: a palette for each
    block along each axis; entries of more than one value are laid out along `vector_axis`.

    Example: indices [[0, 1], [1, 0]] and lut [2, 1, 2, 1] = [[[[5], [6]]], [[[7], [8]]]]
    give [[5, 6], [8, 7]].
    """
    if shape is not None:
        dims = tuple(int(d) for d in shape)
        bits = int(lut.size).bit_length() - 1
        return lut[packing.unpack(indices, bits, int(np.prod(dims)))].reshape(dims)
    groups, (entries, vector) = lut.shape[: indices.ndim], lut.shape[indices.ndim :]
    palette = np.arange(int(np.prod(groups))).reshape(groups)
    chosen = lut.reshape(-1, entries, vector)[_spread(palette, indices.shape), indices]
    if vector == 1:
        return chosen[..., 0]
    axis = int(vector_axis) % indices.ndim  # type: ignore[arg-type]
    expanded = list(indices.shape)
    expanded[axis] *= vector
    return np.moveaxis(chosen, -1, axis + 1).reshape(expanded)


def sparse_to_dense(
    nonzero_data: np.ndarray, mask: np.ndarray, shape: np.ndarray | None = None
) -> np.ndarray:
    """Zeros, with `nonzero_data` in C order where `mask` is 1 (packed bits when `shape` is given)."""
    if shape is not None:
        dims = tuple(int(d) for d in shape)
        mask = packing.unpack(mask, 1, int(np.prod(dims))).reshape(dims)
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


def lut_to_sparse(
    indices_mask: np.ndarray,
    indices_nonzero_data: np.ndarray,
    lut: np.ndarray,
    vector_axis: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(mask, values where the mask is 1) of a palettized sparse tensor."""
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis=vector_axis)
    mask = indices_mask
    if vector_axis is not None:
        mask = np.repeat(mask, lut.shape[-1], int(vector_axis))
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(
    data_mask: np.ndarray, nonzero_data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(mask, values where the mask is 1) of a quantized sparse tensor."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


OPS: Mapping[str, Callable[..., Any]] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": cast,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
}
