"""`edgecomp doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from edgecomp import __version__
from edgecomp.cli import needs
from edgecomp.cli.common import json_option, show
from edgecomp.errors import MissingError

_GIB = 1 << 30
_TOOLS = {
    "adb": "profiling on Android phones: apt-get install adb",
    "ssh-keygen": "keys of boards reached over SSH: apt-get install openssh-client",
    "qemu-aarch64-static": "the emulated Arm device: apt-get install qemu-user-static",
}
_MAC_TOOLS = {"xcrun": "profiling Core ML on this Mac and its iPhone: xcode-select --install"}
_SATURATION = (
    "no VNNI: ONNX Runtime's INT8 kernels add pairs of products in 16 bits and can saturate here; judge "
    "onnx-qdq with optimizations off, or on Arm or a CPU with VNNI"
)
_NO_DOTPROD = "no dotprod: INT8 runs on slower kernels than on Armv8.2 and later"


@dataclass(frozen=True)
class Check:
    """One line of the report. `ok` is None when the line only informs."""

    group: str
    name: str
    value: str
    ok: bool | None = None
    note: str = ""


def facts() -> list[dict[str, Any]]:
    """Every check as a dictionary: group, name, value, ok, note."""
    checks = [*_python(), *_extras(), *_tools(), *_cpu(), *_room()]
    return [asdict(check) for check in checks]


def _python() -> list[Check]:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    note = "" if supported else "edgecomp is tested on Python 3.11 to 3.13"
    torch = needs.version_of("torch")
    lack = [n for n in needs.missing_from(needs.required_by("edgecomp")) if n != "torch"]
    return [
        Check("python", "edgecomp", __version__),
        Check("python", "Python", platform.python_version(), supported, note),
        Check("python", "torch", torch or "not installed", bool(torch), "" if torch else "pip install torch"),
        Check("python", "other packages", ", ".join(lack) + " missing" if lack else "complete", not lack),
    ]


def _extras() -> list[Check]:
    return [_extra(name) for name in needs.extras()]


def _extra(name: str) -> Check:
    wanted = needs.required_by("edgecomp", name)
    lack = needs.missing_from(wanted)
    if lack:
        return Check("extras", name, f"{', '.join(lack)} missing", False, f"pip install 'edgecomp[{name}]'")
    have = [f"{n} {needs.version_of(n)}" for n in wanted if needs.version_of(n)]
    return Check("extras", name, ", ".join(have), True)


def _tools() -> list[Check]:
    wanted = _TOOLS | (_MAC_TOOLS if sys.platform == "darwin" else {})
    found = {name: shutil.which(name) for name in wanted}
    return [
        Check("tools", name, path or "not found", bool(path), "" if path else f"for {wanted[name]}")
        for name, path in found.items()
    ]


def cpu_flags(cpuinfo: str) -> set[str]:
    """The feature words of /proc/cpuinfo (`flags` on x86, `Features` on Arm)."""
    for line in cpuinfo.splitlines():
        key, _, words = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(words.split())
    return set()


def integer_kernels(machine: str, flags: set[str]) -> Check:
    """Which INT8 instructions this CPU has, and what their absence means."""
    if machine in ("x86_64", "AMD64"):
        have = sorted(flags & {"avx2", "avx512_vnni", "avx_vnni", "amx_int8"})
        vnni = bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})
        return Check("cpu", "INT8 features", ", ".join(have) or "none", vnni, "" if vnni else _SATURATION)
    have = sorted(flags & {"asimddp", "i8mm", "sve", "sve2"})
    dot = "asimddp" in flags
    return Check("cpu", "INT8 features", ", ".join(have) or "none", dot, "" if dot else _NO_DOTPROD)


def _cpu() -> list[Check]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = next((line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line), "")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = f"{usable} usable of {os.cpu_count()}"
    checks = [
        Check("cpu", "processor", f"{model or platform.processor()} ({platform.machine()})"),
        Check("cpu", "cores", cores),
    ]
    return [*checks, integer_kernels(platform.machine(), cpu_flags(text))] if text else checks


def _room() -> list[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    checks = [_amount("room", f"disk at {Path.cwd()}", free, 2, "models and reports need room")]
    total, available = memory()
    if total is None or available is None:
        return checks
    note = "training and calibration need more: close other programs"
    line = _amount("room", "memory available", available, 2, note)
    return [*checks, Check("room", "memory", f"{total / _GIB:.1f} GiB"), line]


def _amount(group: str, name: str, size: int, least_gib: int, note: str) -> Check:
    ok = size >= least_gib * _GIB
    return Check(group, name, f"{size / _GIB:.1f} GiB", ok, "" if ok else note)


def memory() -> tuple[int | None, int | None]:
    """Bytes of memory: whole, and available now. (None, None) where /proc/meminfo is not there."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None, None
    rows = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    total, available = (int(rows[k].split()[0]) * 1024 for k in ("MemTotal", "MemAvailable"))
    return total, available


def render(rows: list[dict[str, Any]]) -> Table:
    table = Table("", "", "", "", show_header=False, box=None, pad_edge=False)
    group = ""
    for row in rows:
        if row["group"] != group and group:
            table.add_row()
        group = row["group"]
        mark = {True: "ok", False: "no", None: ""}[row["ok"]]
        table.add_row(row["name"], mark, row["value"], row["note"])
    return table


@click.command("doctor")
@json_option
def command(json_path: str | None) -> None:
    """Show Python, packages, tools, CPU, memory and disk; exit 3 when edgecomp itself cannot run here."""
    rows = facts()
    show(rows, json_path, render)
    if any(row["group"] == "python" and row["ok"] is False and row["name"] != "Python" for row in rows):
        raise MissingError("edgecomp cannot run here: the lines marked `no` above say what is missing")
