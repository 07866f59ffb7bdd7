"""The ONNX runtime on files written with the `onnx` package alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecomp import files, manifest
from edgecomp.errors import ArtifactError, DataError, InputError
from edgecomp.runtimes.onnxruntime import OnnxRuntime
from edgecomp.spec import Artifact, TensorSpec


def write(path: Path) -> Path:
    """y = relu(x + [1, -2]); x is float32 [1, 2], rounded by a QuantizeLinear pair of scale 0.5."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x_quantized"]),
        helper.make_node("DequantizeLinear", ["x_quantized", "scale", "zero"], ["x_rounded"]),
        helper.make_node("Add", ["x_rounded", "offset"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["y"]),
    ]
    constants = {
        "scale": np.float32(0.5),
        "zero": np.int8(0),
        "offset": np.array([1.0, -2.0], np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


@pytest.mark.parametrize("optimize", [True, False])
def test_run(optimize: bool, tmp_path: Path) -> None:
    session = OnnxRuntime().open(write(tmp_path / "m.onnx"), optimize=optimize)
    (found,) = session.run([np.array([[0.3, 4.1]], np.float32)])
    assert found.tolist() == [[1.5, 2.0]]
    assert session.inputs == (TensorSpec("x", (1, 2)),) and session.outputs == (TensorSpec("y", (1, 2)),)


def test_tensors_gives_every_float_value_by_name(tmp_path: Path) -> None:
    session = OnnxRuntime().open(write(tmp_path / "m.onnx"))
    found = session.tensors([np.array([[0.3, 0.9]], np.float32)])
    assert {n: v.tolist() for n, v in found.items()} == {
        "x_rounded": [[0.5, 1.0]],
        "sum": [[1.5, -1.0]],
        "y": [[1.5, 0.0]],
    }


def test_placement_lists_every_operation_with_its_dtype(tmp_path: Path) -> None:
    placed = OnnxRuntime().open(write(tmp_path / "m.onnx")).placement()
    assert [(p.name, p.type, p.placed_on, p.dtype) for p in placed] == [
        ("x_quantized", "QuantizeLinear", "CPU", "int8"),
        ("x_rounded", "DequantizeLinear", "CPU", "float32"),
        ("sum", "Add", "CPU", "float32"),
        ("y", "Relu", "CPU", "float32"),
    ]


@pytest.mark.parametrize(
    "array",
    [np.zeros((1, 3), np.float32), np.zeros((2, 2), np.float32), np.zeros((1, 2), np.float64)],
    ids=["width", "batch", "dtype"],
)
def test_arrays_that_do_not_fit_are_refused(array: np.ndarray, tmp_path: Path) -> None:
    session = OnnxRuntime().open(write(tmp_path / "m.onnx"))
    with pytest.raises(DataError, match=r"input 'x' is .*; the artifact takes float32\[1, 2\]"):
        session.run([array])


def test_a_wrong_number_of_arrays_is_refused(tmp_path: Path) -> None:
    session = OnnxRuntime().open(write(tmp_path / "m.onnx"))
    with pytest.raises(DataError, match=r"0 arrays given; the artifact takes \['x'\]"):
        session.run([])


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_a_damaged_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"cannot open .*m\.onnx"):
        OnnxRuntime().open(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no artifact at .*none\.onnx"):
        OnnxRuntime().open(tmp_path / "none.onnx")


def test_threads_and_providers_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="threads is 0; expected 1 or more"):
        OnnxRuntime().open(path, threads=0)
    with pytest.raises(InputError, match="'NoSuchProvider' is not in this ONNX Runtime; it has .*CPU"):
        OnnxRuntime(("NoSuchProvider",))


def described(path: Path) -> None:
    inputs = (TensorSpec("x", (1, 2), layout="NC"),)
    outputs = (TensorSpec("y", (1, 2), layout="NC"),)
    size = files.size_bytes(path)
    manifest.write(Artifact(path, "onnx", "onnx-fp32", inputs, outputs, files.sha256(path), size))


def test_layouts_come_from_the_manifest(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx")
    described(path)
    assert OnnxRuntime().open(path).inputs[0].layout == "NC"


def test_a_file_that_differs_from_its_manifest_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx")
    described(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match=r"SHA-256|cannot open"):
        OnnxRuntime().open(path)
