"""The LiteRT runtime: doors, placement, intermediate tensors, damaged files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgecomp.errors import ArtifactError, DataError, InputError, MissingError
from edgecomp.exporters.tflite import TFLiteExporter
from edgecomp.exporters.tflite_file import Draft, Quant, Tensor, serialize
from edgecomp.runtimes import litert, litert_file
from edgecomp.runtimes.litert import LiteRTRuntime, check_opens
from edgecomp.spec import Candidate, Data, TensorSpec


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.elu(self.conv(x))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Candidate(Net().eval(), (TensorSpec("picture", (1, 3, 8, 8), "float32", "NCHW"),))
    out = tmp_path_factory.mktemp("litert") / "net.tflite"
    return TFLiteExporter("tflite-fp32").export(made, Data(), out).path


def test_the_first_installed_interpreter_is_taken() -> None:
    runtime = LiteRTRuntime()
    assert runtime.name == "ai-edge-litert"
    assert runtime.version.split(".")[0].isdigit()


def test_a_backend_that_is_not_installed_or_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litert, "_version", lambda name: None)
    with pytest.raises(MissingError, match=r"pip install 'edgecomp\[tflite\]'"):
        LiteRTRuntime()
    with pytest.raises(InputError, match="backend is 'onnx'"):
        LiteRTRuntime("onnx")  # type: ignore[arg-type]


def test_doors_and_results(artifact: Path) -> None:
    x = torch.randn(1, 3, 8, 8)
    stored = x.permute(0, 2, 3, 1).contiguous().numpy()
    wanted = Net()(x).detach().permute(0, 2, 3, 1).numpy()
    for optimize in (True, False):
        session = LiteRTRuntime().open(artifact, optimize=optimize)
        assert session.inputs == (TensorSpec("picture", (1, 8, 8, 3), "float32", "NHWC"),)
        assert session.outputs == (TensorSpec("output", (1, 6, 6, 4), "float32", "NHWC"),)
        np.testing.assert_allclose(session.run([stored])[0], wanted, atol=1e-5)


def test_results_are_copies(artifact: Path) -> None:
    session = LiteRTRuntime().open(artifact)
    first = session.run([np.ones((1, 8, 8, 3), np.float32)])[0]
    kept = first.copy()
    session.run([np.zeros((1, 8, 8, 3), np.float32)])
    np.testing.assert_array_equal(first, kept)


def test_placement_says_who_runs_what(artifact: Path) -> None:
    by_xnnpack = LiteRTRuntime().open(artifact).placement()
    assert [(p.type, p.placed_on, p.dtype) for p in by_xnnpack] == [
        ("CONV_2D", "XNNPACK", "float32"),
        ("ELU", "XNNPACK", "float32"),
    ]
    assert by_xnnpack[0].name == "conv/conv2d"


def test_kernels_that_the_reference_set_lacks_come_from_the_plain_one(artifact: Path) -> None:
    """The reference set has no ELU; the whole file then runs on the built-in kernels without delegate."""
    assert {p.placed_on for p in LiteRTRuntime().open(artifact, optimize=False).placement()} == {"CPU"}
    assert check_opens(artifact, optimize=False) == "BUILTIN_WITHOUT_DEFAULT_DELEGATES"
    assert check_opens(artifact) == "AUTO"


def test_layers_come_in_torch_order(artifact: Path) -> None:
    x = torch.randn(1, 3, 8, 8)
    session = LiteRTRuntime().open(artifact)
    stored = x.permute(0, 2, 3, 1).contiguous().numpy()
    found = session.layers([stored])
    np.testing.assert_allclose(found["conv2d"], Net().conv(x).detach().numpy(), atol=1e-5)
    assert set(session.tensors([stored])) == {"conv/conv2d", "elu"}


def test_wrong_arrays_are_named(artifact: Path) -> None:
    session = LiteRTRuntime().open(artifact)
    with pytest.raises(DataError, match=r"input 'picture' is float32\[1, 3, 8, 8\]"):
        session.run([np.zeros((1, 3, 8, 8), np.float32)])
    with pytest.raises(DataError, match=r"input 'picture' is float64"):
        session.run([np.zeros((1, 8, 8, 3))])
    with pytest.raises(DataError, match="0 arrays given; net.tflite has 1 inputs"):
        session.run([])


def test_missing_foreign_and_cut_files(artifact: Path, tmp_path: Path) -> None:
    runtime = LiteRTRuntime()
    with pytest.raises(ArtifactError, match="no artifact at"):
        runtime.open(tmp_path / "none.tflite")
    foreign = tmp_path / "picture.tflite"
    foreign.write_bytes(b"\x89PNG" + bytes(100))
    with pytest.raises(ArtifactError, match="not a TFLite model"):
        runtime.open(foreign)
    with pytest.raises(InputError, match="threads is 0"):
        runtime.open(artifact, threads=0)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.0, 0.99), st.integers(0, 255))
def test_metadata_of_a_damaged_file_is_read_or_refused(artifact: Path, where: float, byte: int) -> None:
    """Cut anywhere, or one byte changed: a dictionary or an ArtifactError, nothing else."""
    content = bytearray(artifact.read_bytes())
    at = int(where * len(content))
    for damaged in (bytes(content[:at]), bytes(content[:at] + bytes([byte]) + content[at + 1 :])):
        path = artifact.with_name("damaged.tflite")
        path.write_bytes(damaged)
        try:
            found = litert_file.metadata(path)
        except ArtifactError:
            continue
        assert all(isinstance(v, bytes) for v in found.values())


def test_metadata_of_a_file_of_another_tool(tmp_path: Path) -> None:
    """Only a root table without fields: no metadata."""
    path = tmp_path / "other.tflite"
    path.write_bytes(struct.pack("<I4sHHi", 12, b"TFL3", 4, 4, 4) + bytes(8))
    assert litert_file.metadata(path) == {}


def _adds(folder: Path, scale: float) -> Path:
    """x + x in int8, with a scale of the output that may be senseless."""
    draft = Draft()
    x, y = Tensor("x", (1, 3), "int8", Quant.of(0.5)), Tensor("y", (1, 3), "int8", Quant.of(scale))
    draft.emit("ADD", [x, x], [y], "AddOptions")
    path = folder / "add.tflite"
    path.write_bytes(serialize(draft, [("x", x)], [("y", y)], {}))
    return path


def test_a_file_that_makes_the_runtime_abort(tmp_path: Path) -> None:
    """LiteRT aborts the process on an infinite scale: the child dies, we do not."""
    assert check_opens(_adds(tmp_path, 1.0)) == "AUTO"
    with pytest.raises(ArtifactError, match=r"abort \(SIG[A-Z]+"):
        check_opens(_adds(tmp_path, float("inf")))


def test_the_runtimes_own_message_is_passed_on(tmp_path: Path) -> None:
    draft = Draft()
    x, y = Tensor("x", (1, 3), "float32"), Tensor("y", (1, 3), "float32")
    draft.emit("ADD", [x, draft.constant(np.zeros((1, 2), np.float32), "c")], [y], "AddOptions")
    path = tmp_path / "shapes.tflite"
    path.write_bytes(serialize(draft, [("x", x)], [("y", y)], {}))
    with pytest.raises(ArtifactError, match="ai-edge-litert cannot run .*failed to prepare"):
        LiteRTRuntime().open(path)


def test_a_file_of_another_tool_is_described_by_itself(tmp_path: Path) -> None:
    session = LiteRTRuntime().open(_adds(tmp_path, 1.0))
    assert session.inputs == (TensorSpec("x", (1, 3), "int8", "", 0.5, 0),)
    assert session.run([np.array([[1, 2, -4]], np.int8)])[0].tolist() == [[1, 2, -4]]
