"""Names, the nearest of them, and what is missing for one."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from edgecomp import registry
from edgecomp.errors import EdgecompError, MissingError, UnknownNameError

FIRST = ["tflite-int8", "tflite-fp32", "onnx-qdq", "onnx-fp32", "coreml-pal4", "coreml-fp16"]


def test_the_targets_of_the_contract_are_registered() -> None:
    assert set(FIRST) <= set(registry.names("exporters"))


@pytest.mark.parametrize("room", ["exporters", "runtimes", "devices", "steps", "data", "profiling"])
def test_every_registered_name_loads(room: str) -> None:
    names = registry.names(room)
    assert names
    assert all(callable(registry.load(room, name)) or room == "profiling" for name in names)


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown target 'tflite-int9'; did you mean 'tflite-int8'"):
        registry.load("exporters", "tflite-int9")
    with pytest.raises(UnknownNameError, match="known: .*onnx-qdq"):
        registry.entry("exporters", "xyzzy")


def add(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = EntryPoint(name, value, "edgecomp.exporters")
    monkeypatch.setattr(registry, "_points", lambda room: {name: point})


def test_a_missing_library_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "coreml-new", "not_installed_library.sub:Exporter")
    with pytest.raises(MissingError, match=r"'coreml-new' needs not_installed_library.*edgecomp\[coreml\]"):
        registry.load("exporters", "coreml-new")


def test_a_broken_module_of_ours_is_a_bug_and_not_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "onnx-new", "edgecomp.exporters.no_such_file:Exporter")
    with pytest.raises(ModuleNotFoundError) as caught:
        registry.load("exporters", "onnx-new")
    assert not isinstance(caught.value, EdgecompError)


def test_the_format_of_a_target_and_of_a_suffix() -> None:
    assert registry.format_of("tflite-int8") == registry.format_of(".tflite") == "tflite"
    assert registry.format_of(".mlpackage") == registry.format_of("coreml-pal4") == "coreml"
