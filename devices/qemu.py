"""An arm64 root under qemu-aarch64 on this machine: runs artifacts on any Arm core and counts instructions.

The count is exact and the same on every host, so it can be a gate where times are noise. It is not a time:
a core may need one cycle or a hundred for an instruction. Counting needs the dynamically linked
qemu-aarch64 (Debian: qemu-user) and a plugin that prints `mark TAG COUNT` (tests/lab/count.c).
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from edgecomp.devices import host
from edgecomp.devices.faults import OutputFormError
from edgecomp.devices.host import Request
from edgecomp.devices.local import LocalDevice
from edgecomp.errors import InputError, MissingError

# Runs between marks. The first one after the warm-up may still fill caches of the runtime.
_RUNS = 3

# Arm cores that differ in their integer instructions: none, dotprod, and all that QEMU knows.
PROCESSORS = ("cortex-a53", "neoverse-n1", "max")


class QemuDevice(LocalDevice):
    """`root`: an arm64 system with Python, NumPy and a runtime. `cpu`: a name of `qemu-aarch64 -cpu help`.

    `cpus`: the processors of a comparison between processors, which `processors` gives one by one.
    """

    kind = "qemu"
    SETTINGS: ClassVar[dict[str, type]] = {"root": str, "cpu": str, "cpus": str, "plugin": str, "path": str}
    isa = "aarch64"

    def __init__(
        self,
        name: str,
        root: Path,
        *,
        cpu: str = "cortex-a72",
        cpus: tuple[str, ...] = PROCESSORS,
        plugin: Path | None = None,
        path: str = "",
    ) -> None:
        super().__init__(name)
        self.root = root
        self.cpu = cpu
        self.cpus = cpus
        self.plugin = plugin
        self.path = path
        if not (root / "usr/bin/python3").exists():
            raise InputError(f"no {self.isa} system with Python at {root}; expected its usr/bin/python3")
        if shutil.which(f"qemu-{self.isa}") is None:
            raise MissingError(
                f"kind qemu needs qemu-{self.isa}, which is not here: apt-get install qemu-user"
            )

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, Any]) -> QemuDevice:
        plugin = settings.get("plugin")
        return cls(
            name,
            Path(str(settings.get("root", ""))),
            cpu=str(settings.get("cpu", "cortex-a72")),
            cpus=tuple(str(settings.get("cpus", settings.get("cpu", " ".join(PROCESSORS)))).split()),
            plugin=Path(str(plugin)) if plugin else None,
            path=str(settings.get("path", "")),
        )

    def processors(self) -> list[QemuDevice]:
        """This device once for each of its processors, named `NAME:PROCESSOR`."""
        return [QemuDevice(f"{self.name}:{c}", self.root, cpu=c, path=self.path) for c in self.cpus]

    def python(self) -> tuple[str, ...]:
        return self._python()

    def _python(self, *options: str) -> tuple[str, ...]:
        """Python of the root. QEMU looks for absolute paths below the root first, then on this machine."""
        settings = [f"QEMU_CPU={self.cpu}", "PYTHONHOME=/usr", f"PYTHONPATH={self.path}"]
        binary = str(self.root / "usr/bin/python3")
        return ("env", *settings, "qemu-aarch64", "-L", str(self.root), *options, binary)

    def probe(self) -> dict[str, Any]:
        """The root's runtimes; the rest is what is emulated, not this machine's."""
        found = super().probe()
        return found | {
            "model": f"qemu-{self.isa} {self.cpu}",
            "soc": self.cpu,
            "isa": self.isa,
            "isa_features": [],
            "os": "Linux (qemu-user)",
            "governor": None,
            "temperatures": [],
            "emulated": True,
        }

    def instructions(self, request: Request) -> int:
        """Instructions of one inference, by `count`."""
        inputs = ["--inputs", str(request.inputs.resolve())] if request.inputs else []
        choice = ["--runtime", request.runtime, "--accelerator", request.accelerator]
        words = ["profile", str(request.artifact.resolve()), *choice, *inputs]
        return self.count(request.artifact, words, request.timeout_s)

    def count(self, artifact: Path, words: list[str], timeout_s: float) -> int:
        """Instructions of one run of the agent's task: the median of three, one thread, after a warm-up run.

        Raises InputError when no plugin is given, OutputFormError when it counted nothing.
        """
        if self.plugin is None or not self.plugin.exists():
            raise InputError(
                f"device {self.name!r} has no counting plugin ({self.plugin}); build tests/lab/count.c and "
                "name it with --set plugin=PATH"
            )
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "counts"
            plugin = ("-plugin", f"{self.plugin},out={out}")
            # Addresses and hash seeds would change which branches Python and the allocator take.
            fixed = ["setarch", "-R"] if shutil.which("setarch") else []
            python = [*fixed, *self._python("-seed", "1", *plugin)]
            argv = [*host.environment(1), "PYTHONHASHSEED=0", *python, str(host.AGENT), *words]
            events: list[host.Event] = []
            result = self.run(
                [*argv, "--marks", str(_RUNS)], timeout_s, lambda line: events.extend(host.event_of(line))
            )
            host.check(self, artifact, events, result)
            text = out.read_text() if out.exists() else ""
        return counted(text)


class QemuX86Device(QemuDevice):
    """This machine's own Python on an emulated x86-64 processor, such as Haswell: AVX2 without VNNI.

    It shows what older processors make of an artifact: their 8-bit multiply-add saturates at 16 bits.
    """

    kind = "qemu-x86"
    SETTINGS: ClassVar[dict[str, type]] = {"cpu": str}
    isa = "x86_64"

    def __init__(self, name: str, *, cpu: str = "Haswell") -> None:
        super().__init__(name, Path("/"), cpu=cpu)

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, Any]) -> QemuX86Device:
        return cls(name, cpu=str(settings.get("cpu", "Haswell")))

    def processors(self) -> list[QemuDevice]:
        return [self]

    def _python(self, *options: str) -> tuple[str, ...]:
        binary = str(Path(sys.executable).resolve())
        path = os.pathsep.join(entry for entry in sys.path if entry)
        return ("env", f"QEMU_CPU={self.cpu}", f"PYTHONPATH={path}", "qemu-x86_64", *options, binary)


def counted(text: str) -> int:
    """Median of the instructions between marks 3 and 4, 5 and 6, ... less those between 1 and 2.

    Nothing runs between the first two: that is what marking costs. Raises OutputFormError.
    """
    marks = {int(tag): int(count) for tag, count in re.findall(r"^mark (\d+) (\d+)$", text, re.M)}
    runs = [marks[tag + 1] - marks[tag] for tag in sorted(marks) if tag % 2 and tag + 1 in marks]
    if len(runs) < 2:
        raise OutputFormError("the instruction-counting plugin", text)
    return int(statistics.median(runs[1:])) - runs[0]
