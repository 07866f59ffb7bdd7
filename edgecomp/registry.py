"""Name -> class by entry point. Import-light: a class is loaded when its name is asked for, not before.

Groups: `edgecomp.exporters`, `edgecomp.runtimes`, `edgecomp.devices`, `edgecomp.steps`,
`edgecomp.data`. Built-ins enter by the same door as third-party packages.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from edgecomp.errors import MissingError, UnknownNameError

# The extra that brings what a built-in room needs, by the first word of the name.
_EXTRA_OF = {
    "tflite": "tflite",
    "onnx": "onnx",
    "coreml": "coreml",
    "tensorrt": "onnx",
    "ssh": "ssh",
    "adb": "adb",
    "jetson": "ssh",
    "apple": "ssh",
}
_KIND_OF = {
    "exporters": "target",
    "runtimes": "runtime",
    "devices": "device kind",
    "steps": "step",
    "data": "data source",
}


@dataclass(frozen=True)
class Entry:
    """One registered name. `extra` is what `pip install 'edgecomp[extra]'` would bring."""

    name: str
    room: str
    value: str
    distribution: str
    extra: str | None


@cache
def _points(room: str) -> Mapping[str, EntryPoint]:
    return {p.name: p for p in entry_points(group=f"edgecomp.{room}")}


def names(room: str) -> list[str]:
    """Registered names of a room (`exporters`, `runtimes`, `devices`, `steps`), sorted."""
    return sorted(_points(room))


def entry(room: str, name: str) -> Entry:
    """The descriptor of a name, without loading it. Raises UnknownNameError."""
    point = _points(room).get(name)
    if point is None:
        raise UnknownNameError(_KIND_OF.get(room, room), name, _points(room))
    distribution = point.dist.name if point.dist else ""
    extra = _EXTRA_OF.get(name.split("-")[0]) if distribution in ("", "edgecomp") else None
    return Entry(name, room, point.value, distribution, extra)


def load(room: str, name: str) -> Any:
    """The class behind a name. Raises UnknownNameError, or MissingError with the install command."""
    found = entry(room, name)
    module, _, attribute = found.value.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", "edgecomp"):
            raise
        kind = _KIND_OF.get(room, room)
        way_out = f"pip install 'edgecomp[{found.extra}]'" if found.extra else f"pip install {missing}"
        raise MissingError(f"{kind} {name!r} needs {missing}, which is not installed: {way_out}") from error


def format_of(target: str) -> str:
    """The format of a target or artifact suffix: `tflite-int8` -> `tflite`, `.mlpackage` -> `coreml`.

    A suffix that is not ours names its own format, which a third-party runtime may open: `.npz` -> `npz`.
    """
    suffixes = {".tflite": "tflite", ".onnx": "onnx", ".mlpackage": "coreml"}
    return suffixes.get(target, target.removeprefix(".").split("-")[0])
