"""What Android says of its heat and load: `dumpsys thermalservice`, `dumpsys battery`, kernel files."""

from __future__ import annotations

import re
from typing import Any

# Sections for `state`; each tool may be missing or refuse.
SCRIPT = """
echo '== thermalservice'; dumpsys thermalservice 2>/dev/null
echo '== battery'; dumpsys battery 2>/dev/null
echo '== load'; cat /proc/loadavg 2>/dev/null
cd /sys/devices/system/cpu || exit 0
for name in scaling_governor scaling_cur_freq scaling_max_freq cpuinfo_max_freq; do
  echo "== $name"; for c in cpu[0-9]*; do
    [ -r $c/cpufreq/$name ] && echo "$c $(cat $c/cpufreq/$name 2>/dev/null)"; done; done
"""

# Runs a command ("$@") and keeps what its memory was: VmHWM while it lives, and after a second, when a runner
# has loaded its model, what `dumpsys meminfo` says of it. `$EDGECOMP_MEMORY` names the file.
WATCHED = """
"$@" & p=$!; n=0; f=$EDGECOMP_MEMORY; rm -f "$f" "$f.meminfo"
while grep -q VmHWM /proc/$p/status 2>/dev/null; do
  grep -E 'VmHWM|VmSwap' /proc/$p/status > "$f.new" 2>/dev/null && mv "$f.new" "$f"
  [ $n = 2 ] && dumpsys meminfo $p > "$f.meminfo" 2>/dev/null
  n=$((n+1)); sleep 0.5
done
wait $p
"""

# android.os.PowerManager.THERMAL_STATUS_*
STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")


def state(text: str) -> dict[str, Any]:
    """The same keys as the agent's `state`, and `thermal_status` (0 to 6, None when it is not told)."""
    pieces = re.split(r"^== (\w+)\n", text, flags=re.M)
    parts = dict(zip(pieces[1::2], pieces[2::2], strict=False))
    temperatures = current_temperatures(parts.get("thermalservice", ""))
    battery = battery_celsius(parts.get("battery", ""))
    return {
        "governors": _by_core(parts.get("scaling_governor", "")),
        "khz": _numbers(parts.get("scaling_cur_freq", "")),
        "cap_khz": _numbers(parts.get("scaling_max_freq", "")),
        "max_khz": _numbers(parts.get("cpuinfo_max_freq", "")),
        "temperatures": temperatures + ([("battery", battery)] if battery is not None else []),
        "load": [float(word) for word in parts.get("load", "").split()[:3]],
        "thermal_status": thermal_status(parts.get("thermalservice", "")),
    }


def thermal_status(text: str) -> int | None:
    """`Thermal Status: 2` -> 2."""
    found = re.search(r"^\s*Thermal Status:\s*(\d+)", text, re.M)
    return int(found[1]) if found else None


def current_temperatures(text: str) -> list[tuple[str, float]]:
    """Degrees by sensor from the block that was read now; the cached one before it is stale.

    `Temperature{mValue=41.2, mType=0, mName=CPU0, mStatus=0}`; mType 0 is CPU, 1 GPU, 3 skin.
    """
    _, found, block = text.partition("Current temperatures from HAL")
    block = re.split(r"^Current (?:cooling|temp)", block, flags=re.M)[0] if found else ""
    kinds = {"0": "cpu", "1": "gpu", "2": "battery", "3": "skin"}
    rows = re.findall(r"Temperature\{mValue=(-?[\d.]+), mType=(-?\d+), mName=([^,}]+)", block)
    return [(f"{kinds.get(kind, 'other')} {name}", float(value)) for value, kind, name in rows]


def battery_celsius(text: str) -> float | None:
    """`temperature: 305` is tenths of a degree."""
    found = re.search(r"^\s*temperature:\s*(-?\d+)", text, re.M)
    return int(found[1]) / 10 if found else None


def total_pss_bytes(text: str) -> int | None:
    """`TOTAL PSS:    12345` of `dumpsys meminfo PID`, in kB; older systems print `TOTAL   12345`."""
    found = re.search(r"^\s*TOTAL(?: PSS:)?\s+(\d+)", text, re.M)
    return int(found[1]) * 1024 if found else None


def peak_rss_bytes(text: str) -> int | None:
    """`VmHWM:     1234 kB` of /proc/PID/status: the most that was resident."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", text, re.M)
    return int(found[1]) * 1024 if found else None


def swapped_bytes(text: str) -> int | None:
    """`VmSwap:        0 kB` of /proc/PID/status."""
    found = re.search(r"^VmSwap:\s+(\d+) kB", text, re.M)
    return int(found[1]) * 1024 if found else None


def _by_core(text: str) -> dict[str, str]:
    return {row[0]: row[1] for row in (line.split() for line in text.splitlines()) if len(row) == 2}


def _numbers(text: str) -> dict[str, int]:
    return {core: int(value) for core, value in _by_core(text).items() if value.isdigit()}
