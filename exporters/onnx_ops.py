"""ATen operations of the canonical graph in ONNX, one small function each.

Reference: ONNX operator specification, opset 17. Every function gives the name of the value it computed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor
from torch.fx import Node

from edgecomp.errors import UnsupportedOpError
from edgecomp.exporters.onnx_graph import Builder, Lower

aten = torch.ops.aten

DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
NUMPY = {torch.float32: np.float32, torch.int64: np.int64, torch.int32: np.int32, torch.bool: np.bool_}

OPS: dict[Any, Lower] = {}


def lowers(*targets: Any) -> Callable[[Lower], Lower]:
    def register(function: Lower) -> Lower:
        OPS.update(dict.fromkeys(targets, function))
        return function

    return register


def fake(node: Any) -> Tensor:
    return node.meta["val"]


def argument(node: Node, index: int, default: Any = None, key: str = "") -> Any:
    """A positional argument, else the keyword, else the default."""
    if index < len(node.args):
        return node.args[index]
    return node.kwargs.get(key, default)


def pair(setting: Any, count: int = 2) -> list[int]:
    return [setting] * count if isinstance(setting, int) else list(setting) * (count // len(setting))


def operand(b: Builder, value: Any, like: Tensor) -> str:
    """A node's value, or a number as a constant of the other operand's dtype."""
    return b.take(value) if isinstance(value, Node) else b.constant(value, NUMPY[like.dtype])


_UNARY = {
    aten.relu.default: "Relu", aten.sigmoid.default: "Sigmoid", aten.tanh.default: "Tanh",
    aten.exp.default: "Exp",
    aten.log.default: "Log", aten.sqrt.default: "Sqrt", aten.abs.default: "Abs", aten.neg.default: "Neg",
    aten.sin.default: "Sin", aten.cos.default: "Cos", aten.erf.default: "Erf", aten.floor.default: "Floor",
    aten.ceil.default: "Ceil", aten.round.default: "Round", aten.sign.default: "Sign",
    aten.reciprocal.default: "Reciprocal", aten.hardswish.default: "HardSwish",
    aten.logical_not.default: "Not",
    aten.bitwise_not.default: "Not", aten.atan.default: "Atan", aten.tan.default: "Tan",
}  # fmt: skip

_BINARY = {
    aten.add.Tensor: "Add", aten.sub.Tensor: "Sub", aten.mul.Tensor: "Mul", aten.div.Tensor: "Div",
    aten.add.Scalar: "Add", aten.sub.Scalar: "Sub", aten.mul.Scalar: "Mul", aten.div.Scalar: "Div",
    aten.maximum.default: "Max", aten.minimum.default: "Min", aten.matmul.default: "MatMul",
    aten.bmm.default: "MatMul",
    aten.mm.default: "MatMul", aten.pow.Tensor_Scalar: "Pow", aten.pow.Tensor_Tensor: "Pow",
    aten.eq.Tensor: "Equal", aten.eq.Scalar: "Equal", aten.lt.Tensor: "Less", aten.lt.Scalar: "Less",
    aten.le.Tensor: "LessOrEqual", aten.le.Scalar: "LessOrEqual", aten.gt.Tensor: "Greater",
    aten.gt.Scalar: "Greater", aten.ge.Tensor: "GreaterOrEqual", aten.ge.Scalar: "GreaterOrEqual",
    aten.logical_and.default: "And", aten.logical_or.default: "Or", aten.bitwise_and.Tensor: "And",
    aten.bitwise_or.Tensor: "Or", aten.prelu.default: "PRelu",
}  # fmt: skip


@lowers(*_UNARY)
def unary(b: Builder, node: Node) -> str:
    return b.op(_UNARY[node.target], [b.take(node.args[0])])


@lowers(*(t for t in _BINARY if t is not aten.prelu.default))
def binary(b: Builder, node: Node) -> str:
    known = next(fake(a) for a in node.args if isinstance(a, Node))
    left, right = (operand(b, a, known) for a in node.args[:2])
    return b.op(_BINARY[node.target], [left, right])


@lowers(aten.ne.Tensor, aten.ne.Scalar)
def not_equal(b: Builder, node: Node) -> str:
    known = fake(node.args[0])
    return b.op("Not", [b.op("Equal", [operand(b, a, known) for a in node.args[:2]])])


@lowers(aten.prelu.default)
def prelu(b: Builder, node: Node) -> str:
    """The slope [C] broadcasts along axis 1."""
    x, slope = node.args[:2]
    shape = [-1] + [1] * (fake(x).dim() - 2)
    return b.op("PRelu", [b.take(x), b.op("Reshape", [b.take(slope), b.integers(shape)])])


@lowers(aten.rsqrt.default)
def rsqrt(b: Builder, node: Node) -> str:
    return b.op("Reciprocal", [b.op("Sqrt", [b.take(node.args[0])])])


@lowers(aten.relu6.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def clip(b: Builder, node: Node) -> str:
    low, high = argument(node, 1, None, "min"), argument(node, 2, None, "max")
    if node.target is aten.relu6.default:
        low, high = 0.0, 6.0
    elif node.target is aten.clamp_max.default:
        low, high = None, argument(node, 1, None, "max")
    dtype = NUMPY[fake(node).dtype]
    bounds = ["" if v is None else b.constant(v, dtype) for v in (low, high)]
    return b.op("Clip", [b.take(node.args[0]), *bounds])


@lowers(aten.leaky_relu.default, aten.elu.default)
def sloped(b: Builder, node: Node) -> str:
    """`elu(x, alpha, scale, input_scale)` is Selu's parent: PyTorch's selu arrives as elu with a scale."""
    leaky = node.target is aten.leaky_relu.default
    alpha = float(argument(node, 1, 0.01 if leaky else 1.0, "negative_slope" if leaky else "alpha"))
    if leaky:
        return b.op("LeakyRelu", [b.take(node.args[0])], alpha=alpha)
    scale, input_scale = (float(argument(node, i, 1.0, k)) for i, k in ((2, "scale"), (3, "input_scale")))
    if input_scale != 1.0:
        raise UnsupportedOpError(
            f"elu at {node.meta.get('module')!r} has input_scale {input_scale}; expected 1 (celu with "
            "alpha 1, elu or selu)"
        )
    value = b.op("Elu", [b.take(node.args[0])], alpha=alpha)
    return value if scale == 1.0 else b.op("Mul", [value, b.constant(scale, np.float32)])


@lowers(aten.gelu.default)
def gelu(b: Builder, node: Node) -> str:
    """0.5 x (1 + erf(x / sqrt 2)), or its tanh form; ONNX Runtime fuses both."""
    x = b.take(node.args[0])
    half, one = b.constant(0.5, np.float32), b.constant(1.0, np.float32)
    if node.kwargs.get("approximate", "none") == "tanh":
        cube = b.op("Mul", [b.op("Mul", [x, x]), x])
        inner = b.op("Add", [x, b.op("Mul", [cube, b.constant(0.044715, np.float32)])])
        bell = b.op("Tanh", [b.op("Mul", [inner, b.constant(np.sqrt(2 / np.pi), np.float32)])])
    else:
        bell = b.op("Erf", [b.op("Div", [x, b.constant(np.sqrt(2.0), np.float32)])])
    return b.op("Mul", [b.op("Mul", [x, b.op("Add", [bell, one])]), half])


@lowers(aten.softmax.int, aten.log_softmax.int)
def softmax(b: Builder, node: Node) -> str:
    kind = "Softmax" if node.target is aten.softmax.int else "LogSoftmax"
    return b.op(kind, [b.take(node.args[0])], axis=node.args[1])


@lowers(aten.conv2d.default, aten.conv1d.default)
def convolution(b: Builder, node: Node) -> str:
    count = fake(node).dim() - 2
    stride, padding, dilation = (pair(argument(node, i, d), count) for i, d in ((3, 1), (4, 0), (5, 1)))
    inputs = [b.take(n) for n in node.args[:3] if isinstance(n, Node)]
    kernel = list(fake(node.args[1]).shape[2:])
    return b.op(
        "Conv", inputs, kernel_shape=kernel, strides=stride, pads=padding * 2, dilations=dilation,
        group=argument(node, 6, 1),
    )  # fmt: skip


@lowers(aten.conv_transpose2d.input)
def transposed_convolution(b: Builder, node: Node) -> str:
    stride, padding, extra, dilation = (
        pair(argument(node, i, d)) for i, d in ((3, 1), (4, 0), (5, 0), (7, 1))
    )
    inputs = [b.take(n) for n in node.args[:3] if isinstance(n, Node)]
    return b.op(
        "ConvTranspose", inputs, kernel_shape=list(fake(node.args[1]).shape[2:]), strides=stride,
        pads=padding * 2,
        output_padding=extra, dilations=dilation, group=argument(node, 6, 1),
    )  # fmt: skip


@lowers(aten.linear.default)
def linear(b: Builder, node: Node) -> str:
    """Gemm with a transposed weight for 2-D inputs; else MatMul and Add on the weight turned once."""
    x, weight = node.args[:2]
    bias = argument(node, 2)
    if fake(x).dim() == 2:
        inputs = [b.take(n) for n in (x, weight, bias) if n is not None]
        return b.op("Gemm", inputs, transB=1)
    turned = b.take(weight)
    if turned in b.initializers:  # float: turn the constant; quantized weights are turned where they are made
        turned = b.op("Transpose", [turned], perm=[1, 0])
    product = b.op("MatMul", [b.take(x), turned])
    return b.op("Add", [product, b.take(bias)]) if bias is not None else product


@lowers(aten.addmm.default)
def addmm(b: Builder, node: Node) -> str:
    bias, x, weight = (b.take(n) for n in node.args[:3])
    return b.op("Gemm", [x, weight, bias])


@lowers(aten.max_pool2d.default)
def max_pool(b: Builder, node: Node) -> str:
    kernel = pair(node.args[1])
    stride = pair(argument(node, 2) or kernel)
    padding, dilation = pair(argument(node, 3, 0)), pair(argument(node, 4, 1))
    return b.op(
        "MaxPool", [b.take(node.args[0])], kernel_shape=kernel, strides=stride, pads=padding * 2,
        dilations=dilation, ceil_mode=int(argument(node, 5, False)),
    )  # fmt: skip


@lowers(aten.avg_pool2d.default)
def average_pool(b: Builder, node: Node) -> str:
    kernel = pair(node.args[1])
    stride = pair(argument(node, 2) or kernel)
    divisor = argument(node, 6)
    pooled = b.op(
        "AveragePool", [b.take(node.args[0])], kernel_shape=kernel, strides=stride,
        pads=pair(argument(node, 3, 0)) * 2, ceil_mode=int(argument(node, 4, False)),
        count_include_pad=int(argument(node, 5, True) or divisor is not None),
    )  # fmt: skip
    if divisor is None:
        return pooled
    return b.op("Mul", [pooled, b.constant(kernel[0] * kernel[1] / divisor, np.float32)])


_REDUCTIONS = {
    aten.mean.dim: "ReduceMean", aten.amax.default: "ReduceMax", aten.amin.default: "ReduceMin",
}  # fmt: skip


@lowers(*_REDUCTIONS)
def reduce(b: Builder, node: Node) -> str:
    dims = argument(node, 1) or list(range(fake(node.args[0]).dim()))
    keep = int(argument(node, 2, False, "keepdim"))
    axes = [dims] if isinstance(dims, int) else list(dims)
    kind = _REDUCTIONS[node.target]
    if b.opset >= 18:
        return b.op(kind, [b.take(node.args[0]), b.integers(axes)], keepdims=keep)
    return b.op(kind, [b.take(node.args[0])], axes=axes, keepdims=keep)


@lowers(aten.sum.dim_IntList)
def total(b: Builder, node: Node) -> str:
    dims = argument(node, 1) or list(range(fake(node.args[0]).dim()))
    keep = int(argument(node, 2, False, "keepdim"))
    return b.op("ReduceSum", [b.take(node.args[0]), b.integers(list(dims))], keepdims=keep)


@lowers(aten.linalg_vector_norm.default)
def vector_norm(b: Builder, node: Node) -> str:
    kinds = {1: "ReduceL1", 2: "ReduceL2"}
    kind = kinds.get(argument(node, 1, 2, "ord"))
    if kind is None:
        raise UnsupportedOpError(
            f"norm at {node.meta.get('module')!r} has order {argument(node, 1)}; expected 1 or 2"
        )
    dims, keep = argument(node, 2, None, "dim"), int(argument(node, 3, False, "keepdim"))
    axes = [dims] if isinstance(dims, int) else list(dims or range(fake(node.args[0]).dim()))
    if b.opset >= 18:
        return b.op(kind, [b.take(node.args[0]), b.integers(axes)], keepdims=keep)
    return b.op(kind, [b.take(node.args[0])], axes=axes, keepdims=keep)


@lowers(aten.argmax.default, aten.argmin.default)
def arg_extreme(b: Builder, node: Node) -> str:
    kind = "ArgMax" if node.target is aten.argmax.default else "ArgMin"
    dim, keep = argument(node, 1, None, "dim"), int(argument(node, 2, False, "keepdim"))
    if dim is not None:
        return b.op(kind, [b.take(node.args[0])], axis=dim, keepdims=keep)
    flat = b.op("Reshape", [b.take(node.args[0]), b.integers([-1])])
    index = b.op(kind, [flat], axis=0, keepdims=0)
    return b.op("Reshape", [index, b.integers(list(fake(node).shape))])


@lowers(aten.cumsum.default)
def cumulative_sum(b: Builder, node: Node) -> str:
    return b.op("CumSum", [b.take(node.args[0]), b.integers(node.args[1])])


@lowers(aten._to_copy.default)
def cast(b: Builder, node: Node) -> str:
    return b.op("Cast", [b.take(node.args[0])], to=DTYPES[fake(node).dtype])


@lowers(operator.getitem)
def item(b: Builder, node: Node) -> str:
    return b.names[f"{node.args[0].name}.{node.args[1]}"]
