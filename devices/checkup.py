"""What a device lacks to be profiled, with the command that gets it; and installing runtimes there."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgecomp.devices.faults import RuntimeMissingError, last_lines
from edgecomp.devices.transport import Transport
from edgecomp.errors import InputError, MissingError

# Format -> packages that run it, the preferred one first.
RUNTIMES = {"tflite": ("ai-edge-litert", "tflite-runtime", "tensorflow"), "onnx": ("onnxruntime",)}
IMPORTS = {
    "ai-edge-litert": "ai_edge_litert.interpreter",
    "tflite-runtime": "tflite_runtime.interpreter",
    "onnxruntime": "onnxruntime",
    "numpy": "numpy",
}
# glibc minor versions that manylinux tags exist for; a wheel must not need a newer one than the device has.
_GLIBC = (17, 24, 26, 27, 28, 31, 34, 35, 39)


def lacking(name: str, facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """What is missing or doubtful: `what`, and `get`: the command or step that mends it."""
    rows = []
    if not facts["python"]:
        rows.append({"what": "Python 3.9 or newer", "get": "sudo apt-get install python3 (on the device)"})
    elif _version(facts["python"]) < (3, 9):
        rows.append({"what": f"Python 3.9 or newer; {facts['python']} is there", "get": "update its system"})
    have = facts["runtimes"]
    for kind, packages in RUNTIMES.items():
        if not any(package in have for package in packages):
            rows.append({"what": f"a runtime for {kind} files", "get": setup_command(name, kind)})
    if facts["python"] and "numpy" not in have:
        rows.append({"what": "NumPy", "get": setup_command(name, "tflite")})
    for tool in ("timeout", "setsid"):
        if facts["isa"] and tool not in facts["tools"] and not str(facts["os"] or "").startswith("mac"):
            step = "sudo apt-get install coreutils util-linux (on the device)"
            rows.append({"what": f"{tool}, which ends lost work", "get": step})
    governor = facts["governor"]
    if governor and governor != "performance":
        step = "sudo cpupower frequency-set -g performance (on the device)"
        rows.append({"what": f"a steady clock: the governor is {governor}", "get": step})
    return rows


def setup_command(name: str, kind: str) -> str:
    return f"pip install 'edgecomp[{kind}]'" if name == "local" else f"edgecomp devices setup {name}"


def _version(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def platforms(isa: str, glibc: str | None) -> list[str]:
    """Wheel tags that a device takes, such as manylinux_2_28_aarch64; all that are older than its glibc."""
    newest = _version(glibc or "2.28")[1]
    return [f"manylinux2014_{isa}", *[f"manylinux_2_{n}_{isa}" for n in _GLIBC if n <= newest]]


def setup(
    device: Transport, *, kinds: Sequence[str] = ("tflite", "onnx"), wheels: Path | None = None
) -> dict[str, str]:
    """Install runtimes into a folder of their own on the device; returns the versions that load there.

    The wheels come from `wheels` (no network then), or pip on this machine fetches them for the device's
    Python, processor and C library; nothing else of the device is changed. Raises a branch of DeviceError.
    """
    unknown = [kind for kind in kinds if kind not in RUNTIMES]
    if unknown:
        raise InputError(f"no runtime for {unknown[0]!r}; expected some of {', '.join(RUNTIMES)}")
    folder = getattr(device, "runtime_folder", None)
    if folder is None:
        raise InputError(f"device {device.name!r} ({device.kind}) takes no runtime: use pip on that machine")
    facts = device.probe()
    if not facts["python"]:
        raise RuntimeMissingError(f"device {device.name!r} has no Python; install python3 there first")
    with tempfile.TemporaryDirectory() as scratch:
        source = wheels or _fetched(Path(scratch), facts, kinds)
        found = sorted(source.glob("*.whl"))
        if not found:
            raise InputError(f"no .whl file in {source}; fetch some with `pip download --platform ...`")
        staged = [device.stage(wheel) for wheel in found]
    _unpack(device, staged, folder)
    return _loaded(device, kinds)


def _fetched(folder: Path, facts: Mapping[str, Any], kinds: Sequence[str]) -> Path:
    """Download wheels for the device; an older package is tried where the preferred one has no wheel."""
    tags = [word for tag in platforms(facts["isa"], facts.get("glibc")) for word in ("--platform", tag)]
    python = ".".join(str(n) for n in _version(facts["python"]))
    fixed = ["--quiet", "--only-binary=:all:", "--python-version", python, "--dest", str(folder), *tags]
    for kind in kinds:
        tail = ""
        for package in RUNTIMES[kind][:2]:
            wanted = [package, "numpy<2"] if package == "tflite-runtime" else [package, "numpy"]
            argv = [sys.executable, "-m", "pip", "download", *fixed, *wanted]
            done = subprocess.run(argv, capture_output=True, text=True)
            if done.returncode == 0:
                break
            tail = done.stderr
        else:
            raise MissingError(
                f"pip finds no {kind} runtime for Python {python} on {facts['isa']}{last_lines(tail, 3)}; "
                "fetch wheels elsewhere and give their folder with --wheels"
            )
    return folder


def _unpack(device: Transport, staged: Sequence[str], folder: str) -> None:
    """Wheels are zip files whose contents go where Python looks; the old folder stays until all is there."""
    steps = ["set -e", f'rm -rf "{folder}.new"', f'mkdir -p "{folder}.new"']
    words = " ".join(f"'{word}'" for word in device.python())
    steps += [f'{words} -m zipfile -e "{wheel}" "{folder}.new"' for wheel in staged]
    steps += [f'rm -rf "{folder}"', f'mv "{folder}.new" "{folder}"']
    result = device.run(["sh", "-c", "; ".join(steps)], 900)
    if result.exit_code:
        raise RuntimeMissingError(
            f"wheels could not be unpacked on device {device.name!r}{last_lines(result.stderr)}"
        )


def _loaded(device: Transport, kinds: Sequence[str]) -> dict[str, str]:
    have = device.probe()["runtimes"]
    for kind in kinds:
        present = [package for package in RUNTIMES[kind] if package in have]
        if not present:
            raise RuntimeMissingError(
                f"device {device.name!r} has no {kind} runtime after all: none of the wheels holds one"
            )
        module = IMPORTS.get(present[0], present[0])
        result = device.run([*device.python(), "-c", f"import {module}"], 120)
        if result.exit_code:
            raise RuntimeMissingError(
                f"{present[0]} does not load on device {device.name!r}{last_lines(result.stderr, 3)}; its "
                "Python, C library or processor is too old for that wheel: try others with --wheels"
            )
    return dict(have)
