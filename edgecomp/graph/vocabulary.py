"""The operations of a canonical graph, by what quantization has to know of them.

An overload that is in none of these sets can still be exported by a target that knows it; the plan then
leaves it float and lists it.
"""

from __future__ import annotations

import operator

import torch

aten = torch.ops.aten

# One weight (argument 1) and an optional bias (argument 2). -> channel axis of the weight.
WEIGHTED = {
    aten.conv2d.default: 0,
    aten.conv1d.default: 0,
    aten.linear.default: 0,
    aten.conv_transpose2d.input: 1,
}

# Output and inputs share one scale: values are moved, compared or averaged, never changed.
SAME_SCALE = {
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.reshape.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.split_with_sizes.default,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.embedding.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.pixel_shuffle.default,
    aten.repeat.default,
    aten.flip.default,
    aten.roll.default,
    aten.amax.default,
    aten.amin.default,
    aten.where.self,
    operator.getitem,
}

# Output range is known from the function: (scale, zero point) for 8 bits; TFLite's specification.
FIXED_8 = {
    aten.softmax.int: (1.0 / 256.0, -128),
    aten.sigmoid.default: (1.0 / 256.0, -128),
    aten.tanh.default: (1.0 / 128.0, 0),
    aten.log_softmax.int: (16.0 / 256.0, 127),
}
# The same for 16 bits, symmetric.
FIXED_16 = {
    aten.softmax.int: (1.0 / 32768.0, 0),
    aten.sigmoid.default: (1.0 / 32768.0, 0),
    aten.tanh.default: (1.0 / 32768.0, 0),
}

# Integer kernels exist, each input and output with a scale of its own.
FREE_SCALE = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.matmul.default,
    aten.bmm.default,
    aten.relu.default,
    aten.relu6.default,
    aten.clamp.default,
    aten.hardswish.default,
    aten.gelu.default,
    aten.leaky_relu.default,
    aten.prelu.default,
    aten.elu.default,
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.exp.default,
    aten.log.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.abs.default,
    aten.neg.default,
    aten.maximum.default,
    aten.minimum.default,
}

# Activations that are computed inside the operation before them.
FUSED_ACTIVATIONS = {aten.relu.default, aten.relu6.default}
FUSING = {
    aten.conv2d.default,
    aten.conv1d.default,
    aten.linear.default,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
}

QUANTIZED = set(WEIGHTED) | SAME_SCALE | set(FIXED_8) | FREE_SCALE
"""Every operation that an integer kernel exists for in all targets."""
