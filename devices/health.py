"""Was the machine in a state to be measured: throttling, temperatures, governor, other load, swap.

Works on what the agent's `state` says before and after the runs; every function is pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

State = Mapping[str, Any]

# Raspberry Pi, `vcgencmd get_throttled`: bit n says now, bit n + 16 says that it happened since boot.
_PI_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}

# Of several thermal zones, the processor's: the first of these words that fits a zone's type.
_ZONE_WORDS = ("cpu", "x86_pkg", "soc", "big", "package", "acpitz")

_COOLING_WORDS = ("cpu", "processor", "thermal-cpufreq", "gpu")


def pi_flags(before: str | None, after: str | None) -> list[str]:
    """Flags that hold at one of the two readings, or whose sticky half was set between them.

    `throttled=0x50000` at both ends is history from before the run and says nothing of it.
    """
    first, last = _hex(before), _hex(after)
    if last is None:
        return []
    now = (first or 0) | last
    fresh = last & ~(first if first is not None else last)
    return [name for bit, name in _PI_BITS.items() if now >> bit & 1 or fresh >> (bit + 16) & 1]


def _hex(text: str | None) -> int | None:
    found = re.search(r"throttled=(0x[0-9a-fA-F]+)", text or "")
    return int(found.group(1), 16) if found else None


def throttling(before: State, after: State) -> list[str] | None:
    """Reasons why the processor ran slower than it can; an empty list: none. None: nothing was readable."""
    reasons = [f"Raspberry Pi: {flag}" for flag in pi_flags(before.get("vcgencmd"), after.get("vcgencmd"))]
    counts = after.get("throttle_counts") or {}
    rose = [cpu for cpu, n in counts.items() if n > (before.get("throttle_counts") or {}).get(cpu, n)]
    if rose:
        reasons.append(f"thermal throttling was counted on {', '.join(rose)}")
    active = [f"{kind} at {level}" for kind, level in after.get("cooling") or [] if level and _cools(kind)]
    if active:
        reasons.append(f"cooling devices are active: {', '.join(active)}")
    reasons += [f"{cpu} is capped" for cpu in _lowered(before, after)]
    status = after.get("thermal_status")
    if status:
        reasons.append(f"Android's thermal status is {status}")
    known = (
        status is not None
        or _hex(after.get("vcgencmd")) is not None
        or counts
        or after.get("cooling")
        or after.get("cap_khz")
    )
    return reasons if known else None


def _cools(kind: str) -> bool:
    return any(word in kind.lower() for word in _COOLING_WORDS)


def _lowered(before: State, after: State) -> list[str]:
    """Cores whose frequency cap fell during the run."""
    first, last = before.get("cap_khz") or {}, after.get("cap_khz") or {}
    return [cpu for cpu, khz in last.items() if khz < first.get(cpu, khz)]


def temperature(state: State) -> float | None:
    """The processor's temperature in degrees Celsius: the zone named after it, else the warmest."""
    zones = [(str(name).lower(), value) for name, value in state.get("temperatures") or []]
    usable = [(name, value) for name, value in zones if -40 < value < 150]
    for word in _ZONE_WORDS:
        fitting = [value for name, value in usable if word in name]
        if fitting:
            return max(fitting)
    return max((value for _, value in usable), default=None)


def governor(state: State) -> str | None:
    """The frequency governor, or several joined with `+` when cores differ."""
    return "+".join(sorted(set((state.get("governors") or {}).values()))) or None


def warnings(before: State, after: State, *, other_cores: float | None, swapped: int | None) -> list[str]:
    """What makes a figure doubtful, a sentence each."""
    found = []
    reasons = throttling(before, after)
    if reasons:
        found.append(f"throttled: {'; '.join(reasons)}")
    mode = governor(after)
    if mode and mode != "performance":
        found.append(
            f"governor: {mode}, not performance, so the frequency may change during a run "
            "(`cpupower frequency-set -g performance` as root)"
        )
    below = [cpu for cpu, khz in (after.get("cap_khz") or {}).items() if khz < _top(after, cpu, khz)]
    if below:
        found.append(f"capped: {', '.join(sorted(below))} may not reach its highest frequency")
    if other_cores is not None and other_cores > 0.1:
        found.append(f"other load: other programs used {other_cores:.1f} cores during the runs")
    paged = (after.get("swap_in") or 0) - (before.get("swap_in") or 0)
    if swapped or paged > 0:
        found.append("swap: memory was swapped out or read back, so times hold disk accesses")
    return found


def _top(state: State, cpu: str, khz: int) -> int:
    return int((state.get("max_khz") or {}).get(cpu, khz))
