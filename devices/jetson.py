"""A Jetson over SSH: TensorRT engines built on the board from the QDQ file, tegrastats, power.

`.onnx` files run in trtexec when it is there, else in ONNX Runtime (`--accelerator tensorrt` or `cuda`
names its providers); `.tflite` files run in the agent. Not yet verified on a real board: docs/devices.md.
"""

from __future__ import annotations

import contextlib
import shlex
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from edgecomp import files
from edgecomp.devices import host, remote, remote_machine, tegra, trtexec
from edgecomp.devices.faults import ModelCrashError, ModelRefusedError, RuntimeMissingError, last_lines
from edgecomp.devices.host import Figures, Progress, Request
from edgecomp.devices.jetson_power import PowerWatch
from edgecomp.devices.ssh import SshDevice
from edgecomp.errors import DeviceError, InputError
from edgecomp.spec import CommandResult

_STATE = "nvpmodel -q 2>/dev/null; cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null | sort -n | tail -1"


class JetsonDevice(SshDevice):
    """`edgecomp.devices.ssh.SshDevice` with trtexec as the runner of `.onnx` files.

    `clocks`: lock the clocks with jetson_clocks while something is measured (as root, or by a sudo that does
    not ask).
    """

    kind = "jetson"
    SETTINGS: ClassVar[dict[str, type]] = {**SshDevice.SETTINGS, "clocks": bool}
    clocks = False

    # Where a fresh JetPack has trtexec: it is not on PATH.
    tools = "/usr/src/tensorrt/bin"

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, Any]) -> Self:
        device = super().from_settings(name, settings)
        device.clocks = bool(settings.get("clocks", False))
        return device

    def measure(self, request: Request, progress: Progress | None = None) -> list[Figures]:
        own = request.artifact.suffix == ".onnx" and request.accelerator in ("auto", "trtexec")
        version = self._version() if own and request.runtime in ("auto", "trtexec") else None
        if version is None:
            if request.accelerator == "trtexec" or request.runtime == "trtexec":
                raise RuntimeMissingError(
                    f"device {self.name!r} has no trtexec; install it there: sudo apt-get install tensorrt"
                )
            with self._steady():
                return self._by_agent(request, progress)
        if request.against:
            raise InputError("trtexec runs one engine at a time; compare with --accelerator tensorrt")
        engine = self._engine(request, version)
        with self._steady():
            return [self._timed(request, engine, version)]

    def _by_agent(self, request: Request, progress: Progress | None) -> list[Figures]:
        """The agent's figures, with the board's power over its timed runs."""
        moments: dict[str, float] = {}

        def told(event: str) -> None:
            moments[event] = time.monotonic()
            if progress:
                progress(event)

        watch = PowerWatch(self, self._path())
        try:
            found = host.measure(self, request, told)
        finally:
            watch.stop()
        notes = self._notes(self._state().get("power_mode"))
        power = watch.mean(moments.get("warmup", 0.0), moments.get("after", 0.0))
        if request.against or power is None or not found[0].samples_ms:
            return [replace(f, notes=f.notes + notes) for f in found]
        mean = sum(found[0].samples_ms) / len(found[0].samples_ms)
        return [replace(found[0], energy_mj=power * mean / 1000, notes=found[0].notes + notes)]

    @contextlib.contextmanager
    def watched(self) -> Iterator[PowerWatch]:
        """The board's power beside a run of the agent, its clocks locked where that was asked for."""
        with self._steady():
            watch = PowerWatch(self, self._path())
            try:
                yield watch
            finally:
                watch.stop()

    @contextlib.contextmanager
    def _steady(self) -> Iterator[None]:
        """Clocks at their highest while something is measured, as they were before afterwards (`clocks`)."""
        if not self.clocks:
            yield
            return
        store = shlex.quote(f"{self.workdir}/clocks.{uuid.uuid4().hex[:8]}")
        root = f'export PATH={self._path()}; if [ "$(id -u)" = 0 ]; then s=; else s="sudo -n"; fi; '
        done = self._shell(f"{root}$s jetson_clocks --store {store} && $s jetson_clocks")
        if done.exit_code:
            raise DeviceError(
                f"clocks of device {self.name!r} could not be locked{last_lines(done.stderr, 3)}; let "
                f"{self.login.user or 'the user'} run jetson_clocks through sudo without a password, or add "
                "the device without clocks=true"
            )
        try:
            yield
        finally:
            self._shell(f"{root}$s jetson_clocks --restore {store}; rm -f {store}")

    def _notes(self, power_mode: str | None) -> tuple[str, ...]:
        locked = ("clocks locked by jetson_clocks",) if self.clocks else ()
        return (f"power mode {power_mode}", *locked) if power_mode else locked

    def _trtexec(self, words: list[str], timeout_s: float) -> CommandResult:
        return self.run(["env", f"PATH={self._path()}", "trtexec", *words], timeout_s)

    def _path(self) -> str:
        return f"/usr/local/bin:/usr/bin:/bin:{self.tools}"

    def _version(self) -> str | None:
        """TensorRT's version, or None without trtexec. `--help` prints it in the banner."""
        result = self._trtexec(["--help"], 30)
        text = result.stdout + result.stderr
        return (
            trtexec.version(text) or "unknown" if result.exit_code in (0, 1) and "trtexec" in text else None
        )

    def _engine(self, request: Request, version: str) -> str:
        """The engine of this file and this TensorRT, built on the board once. Raises ModelRefusedError."""
        key = f"{files.sha256(request.artifact)[:16]}-{version}"
        engine = f"{self.workdir}/engines/{key}.engine"
        if remote_machine.hash_of(self, engine):
            return engine
        model = self.stage(request.artifact)
        self._shell(f"mkdir -p {shlex.quote(self.workdir)}/engines")
        result = self._trtexec(
            trtexec.building(model, f"{engine}.part", old=_is_old(version)), request.timeout_s
        )
        try:
            self._check(request, result, "build an engine from")
        except DeviceError:
            self._shell(remote.removing(f"{engine}.part"))
            raise
        self._shell(f"mv {shlex.quote(engine)}.part {shlex.quote(engine)}")
        return engine

    def _check(self, request: Request, result: CommandResult, what: str) -> None:
        text = result.stdout + result.stderr
        if result.exit_code < 0:
            raise ModelCrashError(self.name, str(request.artifact), -result.exit_code, text)
        if result.exit_code or not trtexec.passed(text):
            raise ModelRefusedError(
                f"trtexec on device {self.name!r} cannot {what} {request.artifact}{last_lines(text)}"
            )

    def _timed(self, request: Request, engine: str, version: str) -> Figures:
        folder = f"{self.workdir}/trtexec"
        self._shell(f"mkdir -p {shlex.quote(folder)}")
        before = self._state()
        watch = PowerWatch(self, self._path())
        try:
            result = self._trtexec(trtexec.timing(engine, folder, request), request.timeout_s)
        finally:
            watch.stop()
        self._check(request, result, "run")
        texts = {name: self._text(f"{folder}/{name}.json") for name in ("times", "profile", "layers")}
        samples = trtexec.samples(texts["times"], request.warmup_seconds * 1000) if texts["times"] else ()
        power = watch.mean()
        text = result.stdout + result.stderr
        mean = sum(samples) / len(samples) if samples else trtexec.latency(text).get("mean")
        mode = before.get("power_mode")
        return Figures(
            runtime={"name": "trtexec", "version": version, "accelerator": "tensorrt"},
            samples_ms=samples,
            summary=None if samples else trtexec.latency(text),
            ops=trtexec.layers(texts["profile"], texts["layers"] or None) if texts["profile"] else None,
            before=before,
            after=self._state(),
            energy_mj=power * mean / 1000 if power is not None and mean else None,
            notes=self._notes(mode),
        )

    def _text(self, path: str) -> str:
        return self._shell(f"cat {shlex.quote(path)} 2>/dev/null").stdout

    def _state(self) -> dict[str, Any]:
        lines = self._shell(_STATE).stdout
        found: dict[str, Any] = {"power_mode": tegra.power_mode(lines), "temperatures": []}
        last = lines.strip().splitlines()[-1:] or [""]
        if last[0].lstrip("-").isdigit() and len(last[0]) > 3:
            found["temperatures"] = [("soc", int(last[0]) / 1000)]
        return found

    def probe(self) -> dict[str, Any]:
        facts = super().probe()
        version = self._version()
        return facts | ({"runtimes": _with(facts["runtimes"], version)} if version else {})


def _with(runtimes: Mapping[str, str], version: str) -> dict[str, str]:
    return {**runtimes, "trtexec": version}


def _is_old(version: str) -> bool:
    """Before 8.6 the flag was --buildOnly."""
    parts = version.split(".")
    return parts[0].isdigit() and (int(parts[0]), int(parts[1]) if len(parts) > 1 else 0) < (8, 6)
