"""Tiny artifacts for the devices, written with the formats' own libraries."""

from __future__ import annotations

from pathlib import Path

import flatbuffers
import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper, numpy_helper


def write_onnx(path: Path, width: int = 32, layers: int = 3) -> Path:
    """A chain of MatMul and Relu on float32 [1, width]."""
    generator = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for index in range(layers):
        weight = generator.standard_normal((width, width)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{index}"], [f"m{index}"], name=f"matmul{index}"))
        nodes.append(helper.make_node("Relu", [f"m{index}"], [f"r{index}"], name=f"relu{index}"))
        name = f"r{index}"
    door = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, width])
    result = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width])
    graph = helper.make_graph(nodes, "chain", [door], [result], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def write_mixed_onnx(path: Path) -> Path:
    """x [1, 2, 8] in 16 bits -> reshape -> 8 bits -> Gemm: ONNX Runtime 1.31 refuses it at its defaults."""
    stored: dict[str, np.ndarray] = {
        "s16": np.float32(0.001), "z16": np.int16(0), "s8": np.float32(0.05), "z8": np.int8(3),
        "w": np.random.default_rng(0).integers(-127, 127, (8, 8)).astype(np.int8),
        "sw": np.full(8, 0.01, np.float32), "zw": np.zeros(8, np.int8), "to": np.array([2, 8]),
    }  # fmt: skip
    node, kinds = helper.make_node, TensorProto
    nodes = [
        node("QuantizeLinear", ["x", "s16", "z16"], ["xq"], output_dtype=kinds.INT16),
        node("DequantizeLinear", ["xq", "s16", "z16"], ["xd"]),
        node("Reshape", ["xd", "to"], ["r"]),
        node("QuantizeLinear", ["r", "s8", "z8"], ["rq"], output_dtype=kinds.INT8),
        node("DequantizeLinear", ["rq", "s8", "z8"], ["rd"]),
        node("DequantizeLinear", ["w", "sw", "zw"], ["wd"], axis=0),
        node("Gemm", ["rd", "wd"], ["g"], transB=1),
        node("QuantizeLinear", ["g", "s8", "z8"], ["gq"], output_dtype=kinds.INT8),
        node("DequantizeLinear", ["gq", "s8", "z8"], ["y"]),
    ]
    doors = [helper.make_tensor_value_info("x", kinds.FLOAT, [1, 2, 8])]
    results = [helper.make_tensor_value_info("y", kinds.FLOAT, [2, 8])]
    held = [numpy_helper.from_array(np.asarray(a), name) for name, a in stored.items()]
    graph = helper.make_graph(nodes, "mixed", doors, results, held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def write_tflite(path: Path) -> Path:
    """x [1, 8] float32 -> tanh -> cumulative sum (which XNNPACK does not take) -> tanh."""
    tensors = [_tensor(name) for name in ("x", "first", "summed", "y")]
    tensors.append(_tensor("axis", shape=(), kind=schema.TensorType.INT32, buffer=1))
    cumsum = schema.CumsumOptionsT()
    operators = [
        _operator(0, [0], [1]),
        _operator(1, [1, 4], [2], schema.BuiltinOptions.CumsumOptions, cumsum),
        _operator(0, [2], [3]),
    ]
    graph = schema.SubGraphT()
    graph.tensors, graph.operators, graph.inputs, graph.outputs = tensors, operators, [0], [3]
    model = schema.ModelT()
    model.version, model.subgraphs = 3, [graph]
    codes = (schema.BuiltinOperator.TANH, schema.BuiltinOperator.CUMSUM)
    model.operatorCodes = [_code(code) for code in codes]
    model.buffers = [schema.BufferT(), schema.BufferT()]
    model.buffers[1].data = np.frombuffer(np.int32(1).tobytes(), np.uint8)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


def _tensor(
    name: str, shape: tuple[int, ...] = (1, 8), kind: int = schema.TensorType.FLOAT32, buffer: int = 0
) -> schema.TensorT:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), kind, buffer
    return tensor


def _operator(
    code: int, inputs: list[int], outputs: list[int], kind: int = 0, options: object = None
) -> schema.OperatorT:
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = code, inputs, outputs
    operator.builtinOptionsType, operator.builtinOptions = kind, options
    return operator


def _code(builtin: int) -> schema.OperatorCodeT:
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), 1
    return code
