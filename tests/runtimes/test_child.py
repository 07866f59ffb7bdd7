"""Files are opened in a child first: what aborts there is an error here, and the next file is fine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgecomp.errors import ArtifactError
from edgecomp.runtimes import onnxruntime
from edgecomp.runtimes.child import Opener
from edgecomp.runtimes.onnxruntime import OnnxRuntime

SCRIPT = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["path"] == "abort":
        os.abort()
    if request["path"] == "exit":
        sys.exit(3)
    if request["path"] == "hang":
        time.sleep(60)
    with open(request["log"], "a") as log:
        log.write(f"{os.getpid()} {request['path']}\\n")
    print(flush=True)
"""


@pytest.fixture
def opener() -> Iterator[Opener]:
    made = Opener(SCRIPT, "a runtime", timeout_s=20.0)
    yield made
    made.close()


def test_one_child_opens_each_state_of_a_file_once(opener: Opener, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for size in (1, 1, 2):
        opener.check("a", size=size, log=str(log))
    opener.check("b", size=1, log=str(log))
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [path for _, path in lines] == ["a", "a", "b"]
    assert len({pid for pid, _ in lines}) == 1 and lines[0][0] != str(os.getpid())


@pytest.mark.parametrize(("path", "said"), [("abort", "abort .SIGABRT."), ("exit", "exit code 3")])
def test_a_child_that_dies_names_the_file_and_the_next_file_gets_a_new_one(
    path: str, said: str, opener: Opener, tmp_path: Path
) -> None:
    log = str(tmp_path / "log")
    opener.check("a", log=log)
    with pytest.raises(ArtifactError, match=f"{path} makes a runtime .*{said}"):
        opener.check(path, log=log)
    opener.check("b", log=log)
    assert [line.split()[1] for line in Path(log).read_text().splitlines()] == ["a", "b"]


def test_a_file_that_takes_too_long_is_given_up() -> None:
    opener = Opener(SCRIPT, "a runtime", timeout_s=0.5)
    with pytest.raises(ArtifactError, match=r"hang was not open after 0\.5 s with a runtime"):
        opener.check("hang")
    opener.close()


def _doubling(path: Path, dtype: int, shape: list[int | str]) -> Path:
    node = helper.make_node("Add", ["x", "x"], ["y"])
    value = [helper.make_tensor_value_info(n, dtype, shape) for n in "xy"]
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE])
def test_onnx_files_are_run_in_the_child_and_then_here(dtype: int, tmp_path: Path) -> None:
    path = _doubling(tmp_path / "m.onnx", dtype, [1, 4])
    session = OnnxRuntime().open(path)
    (found,) = session.run([np.ones((1, 4), session.inputs[0].dtype)])
    assert found.tolist() == [[2, 2, 2, 2]]


def test_an_onnx_file_that_aborts_the_runtime_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child runs a file as large as the smaller ones are; here it dies of whatever it gets."""
    opener = Opener("import os, sys\nsys.stdin.readline()\nos.abort()\n", "ONNX Runtime")
    monkeypatch.setattr(onnxruntime, "_OPENER", opener)
    path = _doubling(tmp_path / "m.onnx", TensorProto.FLOAT, [1, 4])
    with pytest.raises(ArtifactError, match="m.onnx makes ONNX Runtime abort"):
        OnnxRuntime().open(path)
    opener.close()


def test_a_damaged_file_keeps_the_runtimes_own_message(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ArtifactError, match="cannot open"):
        OnnxRuntime().open(path)
