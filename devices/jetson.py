"""A Jetson over SSH: TensorRT engines built on the board from the QDQ file, tegrastats, power.

`.onnx` files run in trtexec when it is there, else in ONNX Runtime (`--accelerator tensorrt` or `cuda`
names its providers); `.tflite` files run in the agent. Not yet verified on a real board: docs/devices.md.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Mapping
from typing import Any

from edgecomp import files
from edgecomp.devices import host, remote, tegra, trtexec
from edgecomp.devices.faults import ModelCrashError, ModelRefusedError, RuntimeMissingError, last_lines
from edgecomp.devices.host import Figures, Progress, Request
from edgecomp.devices.ssh import SshDevice
from edgecomp.errors import DeviceError, InputError
from edgecomp.spec import CommandResult

_STATE = "nvpmodel -q 2>/dev/null; cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null | sort -n | tail -1"


class JetsonDevice(SshDevice):
    """`edgecomp.devices.ssh.SshDevice` with trtexec as the runner of `.onnx` files."""

    kind = "jetson"

    # Where a fresh JetPack has trtexec: it is not on PATH.
    tools = "/usr/src/tensorrt/bin"

    def measure(self, request: Request, progress: Progress | None = None) -> list[Figures]:
        own = request.artifact.suffix == ".onnx" and request.accelerator in ("auto", "trtexec")
        version = self._version() if own and request.runtime in ("auto", "trtexec") else None
        if version is None:
            if request.accelerator == "trtexec" or request.runtime == "trtexec":
                raise RuntimeMissingError(
                    f"device {self.name!r} has no trtexec; install it there: sudo apt-get install tensorrt"
                )
            return host.measure(self, request, progress)
        if request.against:
            raise InputError("trtexec runs one engine at a time; compare with --accelerator tensorrt")
        return [self._timed(request, self._engine(request, version), version)]

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
        if self._remote_hash(engine):
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
        watch = _Watch(self)
        try:
            result = self._trtexec(trtexec.timing(engine, folder, request), request.timeout_s)
        finally:
            watched = watch.stop()
        self._check(request, result, "run")
        texts = {name: self._text(f"{folder}/{name}.json") for name in ("times", "profile", "layers")}
        samples = trtexec.samples(texts["times"], request.warmup_seconds * 1000) if texts["times"] else ()
        power = tegra.mean_milliwatts(watched)
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
            notes=(f"power mode {mode}",) if mode else (),
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


class _Watch:
    """tegrastats beside a run, on the same connection."""

    def __init__(self, device: JetsonDevice) -> None:
        self.samples: list[tegra.Sample] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(device,), daemon=True)
        self._thread.start()

    def _read(self, device: JetsonDevice) -> None:
        """Short runs, one after the other, so that it ends soon when it is told to."""
        while not self._stopped.is_set():
            try:
                argv = ["env", f"PATH={device._path()}", "timeout", "2", "tegrastats", "--interval", "200"]
                result = device.run(argv, 5)
            except DeviceError:
                return
            parsed = [tegra.parse_line(line) for line in result.stdout.splitlines()]
            self.samples += [sample for sample in parsed if sample]
            if not parsed:
                return

    def stop(self) -> list[tegra.Sample]:
        self._stopped.set()
        self._thread.join(6)
        return self.samples
