"""A Jetson's power beside a run: tegrastats, or the INA3221 channels where it tells no total rail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from statistics import fmean

from edgecomp.devices import tegra
from edgecomp.devices.transport import Transport
from edgecomp.errors import DeviceError

# Each reading is a short command, so that the watch ends soon when it is told to.
_SECONDS = 2
_READINGS = 10
_INA_LOOP = f"n=0; while [ $n -lt {_READINGS} ]; do {tegra.INA_SCRIPT} sleep 0.2; n=$((n+1)); done"


class PowerWatch:
    """Readings (seconds of a monotonic clock, milliwatts of the whole board), taken in a thread of its own.

    `tools`: the PATH on which tegrastats stands. `mean` looks at the readings between two moments.
    """

    def __init__(self, device: Transport, tools: str) -> None:
        self.readings: list[tuple[float, float]] = []
        self._device, self._tools = device, tools
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        """tegrastats while it tells the board's power, else INA3221 while that does."""
        for source in (self._tegrastats, self._ina3221):
            while not self._stopped.is_set():
                before = len(self.readings)
                try:
                    source()
                except DeviceError:
                    return
                if len(self.readings) == before:
                    break

    def _tegrastats(self) -> None:
        argv = ["env", f"PATH={self._tools}", "timeout", str(_SECONDS), "tegrastats", "--interval", "200"]
        self._device.run(argv, _SECONDS + 3, on_line=self._keep(self._of_line))

    def _ina3221(self) -> None:
        argv = ["sh", "-c", _INA_LOOP]
        self._device.run(argv, _SECONDS + 8, on_line=self._keep(lambda s: tegra.ina3221(s + "\n")))

    @staticmethod
    def _of_line(line: str) -> dict[str, float]:
        sample = tegra.parse_line(line)
        return {k: float(v) for k, v in sample.milliwatts.items()} if sample else {}

    def _keep(self, read: Callable[[str], dict[str, float]]) -> Callable[[str], None]:
        def keep(line: str) -> None:
            power = tegra.total_milliwatts(read(line))
            if power is not None:
                self.readings.append((time.monotonic(), power))

        return keep

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(_SECONDS + 8)

    def mean(self, start: float = float("-inf"), end: float = float("inf")) -> float | None:
        """Mean milliwatts of the readings in [start, end]; None when there is none."""
        values = [power for at, power in self.readings if start <= at <= end]
        return fmean(values) if values else None
