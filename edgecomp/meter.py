"""Seconds and peak memory of a piece of work in this process."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Meter:
    """`with Meter() as meter: ...` -> `meter.seconds`, `meter.peak_rss_bytes`.

    The peak is the resident set's high-water mark within the block: Linux resets it by writing 5 to
    /proc/self/clear_refs (proc_pid_clear_refs(5)). None where the system does not offer that.
    """

    seconds: float = 0.0
    peak_rss_bytes: int | None = None

    def __enter__(self) -> Meter:
        self._resettable = _reset()
        self._start = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.monotonic() - self._start
        self.peak_rss_bytes = _high_water() if self._resettable else None


def _reset() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int | None:
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
