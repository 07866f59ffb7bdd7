"""What ONNX Runtime makes of a file: the kernels of its optimized graph, and the provider that each runs on.

The optimized graph is written by the session itself (`optimized_model_filepath`), the providers come from
the profile of one run on zeros. A kernel is brought back to the operation of the file by its name, which
ONNX Runtime keeps (`Conv_4` becomes `Conv_4_token_223` when QDQ pairs are folded into it).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from edgecomp.errors import ArtifactError
from edgecomp.spec import OpPlacement

Open = Callable[[Path, ort.SessionOptions, Sequence[str]], ort.InferenceSession]

# Kernels of integers whose operands may be floats at the door or at the end.
_INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize", "QAttention", "QEmbed")
_BORDERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
# What ONNX Runtime appends to the name of an operation that others were folded into.
_APPENDED = ("_token_", "/MatMulAddFusion")


def kernels(
    path: Path, options: ort.SessionOptions, providers: Sequence[str], opened: Open
) -> list[OpPlacement]:
    """One row for each operation of the file: `dtype` is int8 or float32, `""` where it is inside another.

    `name` is the value that the operation gives, as the file names it. `type` is the kernel's. Raises
    ArtifactError when the model does not run on zeros.
    """
    file = onnx.load(str(path), load_external_data=False)
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = opened(path, options, providers)
        try:
            session.run(None, _zeros(session))
        except Exception as error:  # ONNX Runtime raises many unrelated classes from its C++ side
            first = " ".join(str(error).split())[:300]
            raise ArtifactError(
                f"{path} does not run on zeros, so its kernels were not read: {first}"
            ) from error
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    ran = {_own_name(n.name): n for n in graph.node if n.name and n.op_type not in _BORDERS}
    integer = computes_integers(graph)
    on = places(events)
    rows = []
    for node in file.graph.node:
        if node.op_type in _BORDERS:
            continue
        name, kernel = value_name(node, file.graph), ran.get(node.name)
        if kernel is None:
            rows.append(OpPlacement(name, node.op_type, "", ""))
            continue
        dtype = "int8" if integer(kernel) else "float32"
        rows.append(OpPlacement(name, kernel.op_type, on.get(kernel.name, ""), dtype))
    return rows


def _own_name(kernel: str) -> str:
    for suffix in _APPENDED:
        kernel = kernel.partition(suffix)[0]
    return kernel


def value_name(node: onnx.NodeProto, graph: onnx.GraphProto) -> str:
    """The name of what an operation gives: of its rounded value, where a QDQ pair follows at once."""
    output = node.output[0]
    for reader in graph.node:
        if reader.op_type == "QuantizeLinear" and reader.input[0] == output:
            return str(reader.output[0]).removesuffix("_quantized")
    return str(output)


def computes_integers(graph: onnx.GraphProto) -> Callable[[onnx.NodeProto], bool]:
    """Says of a kernel of an optimized graph whether it works on integers that stand for reals."""
    makers = {o: n for n in graph.node for o in n.output}
    constants = {i.name: i.data_type for i in graph.initializer}
    eight = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)

    def is_integer(kernel: onnx.NodeProto, depth: int = 0) -> bool:
        if kernel.op_type.startswith(_INTEGER):
            return True
        return depth < 200 and any(_from_integers(i, depth) for i in kernel.input[:1])

    def _from_integers(value: str, depth: int) -> bool:
        if value in constants:
            return constants[value] in eight
        maker = makers.get(value)
        if maker is None or maker.op_type == "DequantizeLinear" or maker.op_type in _FLOAT_RESULT:
            return False
        return maker.op_type == "QuantizeLinear" or is_integer(maker, depth + 1)

    return is_integer


_FLOAT_RESULT = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits")


def places(events: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Kernel -> short name of its provider, from ONNX Runtime's profile."""
    end = "_kernel_time"
    return {
        str(e["name"]).removesuffix(end): str(e["args"]["provider"]).removesuffix("ExecutionProvider")
        for e in events
        if e.get("cat") == "Node" and str(e.get("name", "")).endswith(end) and "provider" in e.get("args", {})
    }


def _zeros(session: ort.InferenceSession) -> dict[str, np.ndarray]:
    types: dict[str, Any] = {
        "tensor(float)": np.float32,
        "tensor(int64)": np.int64,
        "tensor(int32)": np.int32,
    }
    types |= {"tensor(int8)": np.int8, "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_}
    return {
        door.name: np.zeros(
            [n if isinstance(n, int) and n > 0 else 1 for n in door.shape], types.get(door.type, np.float32)
        )
        for door in session.get_inputs()
    }
