"""An Android device over adb: the system's adb, or the one that adbutils carries.

Runs LiteRT's `benchmark_model` when its path is given, else our agent where the device has Python.
Messages of adb 29 and 36 are told apart by their words, not their prefix (`error:`, later `adb:`). What adb
prints about a push is not believed: the SHA-256 on the device is.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import adbutils

from edgecomp import files
from edgecomp.devices import android, benchmark_model, facts, host, remote, remote_machine
from edgecomp.devices.faults import (
    AuthenticationError,
    DroppedError,
    ModelCrashError,
    ModelRefusedError,
    NoSpaceError,
    OfflineError,
    RuntimeMissingError,
    TookTooLongError,
    UnreachableError,
    last_lines,
)
from edgecomp.devices.host import Figures, Progress, Request
from edgecomp.devices.local import LocalDevice
from edgecomp.devices.transport import OnLine, with_signal
from edgecomp.errors import DeviceError, InputError
from edgecomp.spec import CommandResult

_PUSH_BYTES_PER_S = 500_000
_ATTEMPTS = 2


def find_adb() -> str:
    """The system's adb, else the one inside adbutils."""
    return shutil.which("adb") or adbutils.adb_path()


def failure(serial: str, text: str) -> DeviceError | InputError | None:
    """What a message of adb itself means; None when it is not one that is known."""
    said = text.lower()
    if "unauthorized" in said:
        return AuthenticationError(
            f"device {serial} does not know this machine's adb key; unlock its screen and accept the "
            "question about USB debugging, then run the same command again"
        )
    if "no space left" in said:
        return NoSpaceError(
            f"device {serial} is full{last_lines(text, 2)}; remove files from /data/local/tmp"
        )
    if "more than one device" in said:
        return InputError("several devices are attached; name one with `devices add NAME --adb SERIAL`")
    if "offline" in said:
        return OfflineError(f"device {serial} is offline; unplug it, plug it in again and unlock its screen")
    if "not found" in said or "no devices" in said or "cannot connect" in said or "failed to connect" in said:
        return UnreachableError(
            f"adb sees no device {serial}{last_lines(text, 2)}; check the cable and that USB debugging is on "
            "(`adb devices` lists what is attached)"
        )
    if any(
        word in said for word in ("closed", "reset", "protocol fault", "eof", "disconnected", "broken pipe")
    ):
        return DroppedError(
            f"device {serial} was lost in the middle of work{last_lines(text, 2)}; plug it in again"
        )
    return None


class AdbDevice:
    """`edgecomp.devices.transport.Transport` over adb, shell protocol version 2 (exit codes, two streams).

    `serial`: as `adb devices` shows it. `runner`: path of `benchmark_model` for the device's processor, on
    this machine. `interpreter`: Python on the device, if it has one.
    """

    kind = "adb"
    SETTINGS: ClassVar[dict[str, type]] = {
        "serial": str,
        "runner": str,
        "workdir": str,
        "python": str,
        "adb": str,
    }

    def __init__(
        self,
        name: str,
        serial: str,
        *,
        runner: Path | None = None,
        workdir: str = "/data/local/tmp/edgecomp",
        interpreter: str = "python3",
        adb: str | None = None,
    ) -> None:
        self.name = name
        self.serial = serial
        self.runner = runner
        self.workdir = workdir
        self.interpreter = interpreter
        self.adb = adb or find_adb()
        self._host = LocalDevice(name)

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, Any]) -> AdbDevice:
        if not settings.get("serial"):
            raise InputError(f"device {name!r} of kind adb needs a serial; `adb devices` shows it")
        runner = settings.get("runner")
        return cls(
            name,
            str(settings["serial"]),
            runner=Path(str(runner)) if runner else None,
            workdir=str(settings.get("workdir", "/data/local/tmp/edgecomp")),
            interpreter=str(settings.get("python", "python3")),
            adb=str(settings["adb"]) if "adb" in settings else None,
        )

    # -- commands

    def run(self, argv: Sequence[str], timeout_s: float, on_line: OnLine | None = None) -> CommandResult:
        running: list[int] = []
        finished = False
        try:
            result = self._call(
                "shell",
                remote.wrapped(argv, timeout_s),
                limit_s=timeout_s + 8,
                on_line=on_line,
                on_error_line=lambda line: running.extend(remote.groups(line + "\n")[0]),
            )
            finished = result.exit_code >= 0
        except TookTooLongError as error:
            raise remote_machine.too_long(self.name, argv, timeout_s) from error
        finally:
            if not finished:
                self._end(running)
        if not finished:
            raise DroppedError(f"the run of {argv[0]} on device {self.name!r} was ended from this machine")
        groups, stderr = remote.groups(result.stderr)
        if not groups:
            self._raise(result)
        if result.exit_code == remote.TIMED_OUT:
            raise remote_machine.too_long(self.name, argv, timeout_s)
        if result.exit_code not in (0, *range(2, 128)) or "adb:" in stderr or "error:" in stderr:
            self._still_there(groups)
        return CommandResult(tuple(argv), with_signal(result.exit_code), result.stdout, stderr)

    def _still_there(self, groups: Sequence[int]) -> None:
        """After a suspicious end: was it the command's, or was the device lost?"""
        state = self._call("get-state", limit_s=15)
        if state.exit_code or state.stdout.strip() != "device":
            lost = failure(self.serial, state.stderr) or failure(self.serial, "closed")
            raise DroppedError(
                f"device {self.name!r} was lost in the middle of work ({lost}); its work there ends "
                "at its limit"
            )

    def _end(self, groups: Sequence[int]) -> None:
        """Kill what was started there, with a client of its own."""
        if groups:
            with contextlib.suppress(DeviceError):
                LocalDevice().run([self.adb, "-s", self.serial, "shell", remote.killing(groups)], 20)

    def _call(
        self,
        *words: str,
        limit_s: float,
        on_line: OnLine | None = None,
        on_error_line: OnLine | None = None,
    ) -> CommandResult:
        return self._host.run([self.adb, "-s", self.serial, *words], limit_s, on_line, on_error_line)

    def _raise(self, result: CommandResult) -> None:
        text = result.stderr + result.stdout
        known = failure(self.serial, text)
        if known:
            raise known
        if result.exit_code:
            raise DeviceError(
                f"`adb {' '.join(result.argv[1:4])} ...` ended with {result.exit_code}{last_lines(text)}"
            )

    def kill(self, group: int) -> None:
        self._end((group,))

    def close(self) -> None:
        self._host.close()

    # -- files

    def push(self, source: Path, destination: str) -> None:
        """A file is sent whole (adb cannot append), then has its name when its SHA-256 agrees."""
        for file, place in remote_machine.each_file(source, destination):
            self._push_file(file, place)

    def _push_file(self, source: Path, destination: str) -> None:
        wanted = (source.stat().st_size, files.sha256(source))
        if remote_machine.hash_of(self, destination) == wanted:
            return
        self._shell(f"mkdir -p {shlex.quote(str(PurePosixPath(destination).parent))}")
        part = f"{destination}.{wanted[1][:12]}.part"
        limit = 60 + wanted[0] / _PUSH_BYTES_PER_S
        for attempt in range(_ATTEMPTS):
            result = self._call("push", str(source), part, limit_s=limit)
            if result.exit_code == 0 and remote_machine.hash_of(self, part) == wanted:
                self._shell(f"mv {shlex.quote(part)} {shlex.quote(destination)}")
                return
            if attempt == _ATTEMPTS - 1 or failure(self.serial, result.stderr + result.stdout):
                self._raise(result)
        raise DroppedError(
            f"{source} did not arrive whole on device {self.name!r}: its SHA-256 differs; try again"
        )

    def _shell(self, line: str, timeout_s: float = 60.0) -> CommandResult:
        return remote_machine.shell(self, line, timeout_s)

    def pull(self, source: str, destination: Path) -> None:
        found = remote_machine.hash_of(self, source)
        if found is None:
            raise DeviceError(f"no file {source} on device {self.name!r}")
        with files.atomic(destination) as temporary:
            self._raise(self._call("pull", source, str(temporary), limit_s=60 + found[0] / _PUSH_BYTES_PER_S))
            if files.sha256(temporary) != found[1]:
                raise DroppedError(f"{source} did not arrive whole from device {self.name!r}; try again")

    def stage(self, source: Path) -> str:
        path = remote_machine.staged_path(self.workdir, source)
        self.push(source, path)
        return path

    # -- the machine and its runners

    @property
    def runtime_folder(self) -> str:
        return remote_machine.runtime_folder(self.workdir)

    def python(self) -> tuple[str, ...]:
        return remote_machine.python_words(self.workdir, self.interpreter)

    def probe(self) -> dict[str, Any]:
        return facts.parse(self._shell(facts.script(self.python())).stdout)

    def measure(self, request: Request, progress: Progress | None = None) -> list[Figures]:
        """With `benchmark_model` when it is given and the artifact is a .tflite file, else with the agent."""
        if self.runner is None or request.artifact.suffix != ".tflite":
            if not self.probe()["python"]:
                raise RuntimeMissingError(
                    f"device {self.name!r} has no Python for the agent; give LiteRT's benchmark_model for "
                    f"its processor: edgecomp devices add {self.name} --adb {self.serial} --set runner=PATH"
                )
            return host.measure(self, request, progress)
        if request.against:
            raise InputError("benchmark_model runs one artifact at a time; compare on a device with Python")
        return [self._benchmarked(request)]

    def _benchmarked(self, request: Request) -> Figures:
        runner, model = self.stage(Path(str(self.runner))), self.stage(request.artifact)
        self._shell(f"chmod 755 {shlex.quote(runner)}")
        before = android.state(self._shell(android.SCRIPT).stdout)
        argv = [*_pinned(request.pin), runner, *benchmark_model.arguments(model, request)]
        kept = f"{self.workdir}/memory"
        watched = ["env", f"EDGECOMP_MEMORY={kept}", "sh", "-c", android.WATCHED, "sh"]
        result = self.run([*watched, *argv], request.timeout_s)
        after = android.state(self._shell(android.SCRIPT).stdout)
        if result.exit_code < 0:
            raise ModelCrashError(self.name, str(request.artifact), -result.exit_code, result.stderr)
        if result.exit_code:
            raise ModelRefusedError(
                f"benchmark_model on device {self.name!r} cannot run {request.artifact}"
                f"{last_lines(result.stderr)}"
            )
        found = benchmark_model.figures(result.stdout + result.stderr, before=before, after=after)
        return self._with_memory(
            found, self._shell(f"cat {shlex.quote(kept)} {shlex.quote(kept)}.meminfo").stdout
        )

    @staticmethod
    def _with_memory(found: Figures, text: str) -> Figures:
        """What the kernel and dumpsys say of the runner's memory goes before its own account of it."""
        peak = android.peak_rss_bytes(text)
        return replace(
            found,
            peak_rss_bytes=found.peak_rss_bytes if peak is None else peak,
            pss_bytes=android.total_pss_bytes(text),
            swapped_bytes=android.swapped_bytes(text),
        )


def _pinned(cores: Sequence[int]) -> list[str]:
    """Android's taskset takes a hexadecimal mask."""
    return ["taskset", f"{sum(1 << core for core in cores):x}"] if cores else []
