"""Nothing half-written is found under its final name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from edgecomp import files
from edgecomp.errors import OutputError


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "new" / "model.tflite"
    with files.atomic(final) as temporary:
        temporary.write_bytes(b"whole")
        assert not final.exists()
        assert temporary.suffix == ".tflite", "converters look at the suffix"
    assert final.read_bytes() == b"whole"
    assert list(final.parent.iterdir()) == [final]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    final = tmp_path / "model.onnx"
    final.write_bytes(b"old")
    with pytest.raises(type(error)), files.atomic(final) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert final.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [final]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    final = tmp_path / "model.mlpackage"
    for name in ("first", "second"):
        with files.atomic(final) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [p.name for p in final.iterdir()] == ["second"]


def test_a_full_disk_is_named_with_the_way_out(tmp_path: Path) -> None:
    final = tmp_path / "model.onnx"
    with (
        pytest.raises(OutputError, match=r"model\.onnx: No space left.*--out"),
        files.atomic(final) as temporary,
    ):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="out"):
        files.check_writable(tmp_path / "out")


def test_the_hash_of_a_folder_depends_on_names_and_contents(tmp_path: Path) -> None:
    for order in (["a", "b"], ["b", "a"]):
        folder = tmp_path / "".join(order)
        folder.mkdir()
        for name in order:
            (folder / name).write_text(name)
    assert files.sha256(tmp_path / "ab") == files.sha256(tmp_path / "ba")
    (tmp_path / "ba" / "b").rename(tmp_path / "ba" / "c")
    assert files.sha256(tmp_path / "ab") != files.sha256(tmp_path / "ba")


def test_the_hash_and_size_of_a_file_are_those_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"edgecomp" * 1000)
    assert files.sha256(path) == hashlib.sha256(b"edgecomp" * 1000).hexdigest()
    assert files.size_bytes(path) == 8000
    assert files.size_bytes(tmp_path) == 8000
