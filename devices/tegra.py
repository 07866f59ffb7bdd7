"""What a Jetson tells of itself: tegrastats, INA3221 power monitors, nvpmodel.

tegrastats prints a line each interval; every field may be missing and they come in any order:
`RAM 2512/7772MB (lfb 4x2MB) SWAP 0/3886MB CPU [12%@1190,off,3%@1190] GR3D_FREQ 0%@[306] cpu@42.5C
VDD_IN 3500mW/3400mW`. A temperature of -256C is a sensor that is off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# The rail that feeds the whole board, by module; the first that is there tells what an inference costs.
TOTAL_RAILS = ("VDD_IN", "VIN_SYS_5V0", "POM_5V_IN", "VIN")

# Volts and amperes of all INA3221 channels, readable without root: `label millivolts milliamperes`. JetPack 4
# names them under iio and tells milliwatts alone, which are printed as milliamperes at one volt.
INA_SCRIPT = """
for d in /sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*; do for n in 1 2 3; do
  [ -r $d/in${n}_label ] && [ -r $d/curr${n}_input ] &&
  echo "$(cat $d/in${n}_label) $(cat $d/in${n}_input) $(cat $d/curr${n}_input)"; done; done
for d in /sys/bus/i2c/drivers/ina3221x/*/iio:device*; do for n in 0 1 2; do
  [ -r $d/rail_name_$n ] && [ -r $d/in_power${n}_input ] &&
  echo "$(cat $d/rail_name_$n) 1000 $(cat $d/in_power${n}_input)"; done; done
"""


@dataclass(frozen=True)
class Sample:
    """One line of tegrastats. Loads in percent, frequencies in MHz, power in mW; None: not told."""

    ram_mb: tuple[int, int] | None = None
    swap_mb: tuple[int, int] | None = None
    cpu_percent: tuple[int | None, ...] = ()
    cpu_mhz: tuple[int | None, ...] = ()
    gpu_percent: int | None = None
    gpu_mhz: tuple[int, ...] = ()
    memory_mhz: int | None = None
    celsius: dict[str, float] = field(default_factory=dict)
    milliwatts: dict[str, int] = field(default_factory=dict)


def parse_line(line: str) -> Sample | None:
    """A line as a sample; None for a line that has none of the known fields."""
    ram = re.search(r"\bRAM (\d+)/(\d+)MB", line)
    swap = re.search(r"\bSWAP (\d+)/(\d+)MB", line)
    cpu = re.search(r"\bCPU \[([^\]]*)\]", line)
    gpu = re.search(r"\bGR3D_FREQ (\d+)%(?:@\[([\d,]*)\]|@(\d+))?", line)
    clocks = re.search(r"\bGR3D_FREQ @?\[([\d,]+)\]", line)
    memory = re.search(r"\bEMC_FREQ \d+%@(\d+)", line)
    cores = [re.fullmatch(r"(\d+)%@(\d+)", word.strip()) for word in cpu[1].split(",")] if cpu else []
    megahertz = (gpu[2] or gpu[3] or "") if gpu else (clocks[1] if clocks else "")
    sample = Sample(
        ram_mb=(int(ram[1]), int(ram[2])) if ram else None,
        swap_mb=(int(swap[1]), int(swap[2])) if swap else None,
        cpu_percent=tuple(int(core[1]) if core else None for core in cores),
        cpu_mhz=tuple(int(core[2]) if core else None for core in cores),
        gpu_percent=int(gpu[1]) if gpu else None,
        gpu_mhz=tuple(int(word) for word in megahertz.split(",") if word),
        memory_mhz=int(memory[1]) if memory else None,
        celsius=temperatures(line),
        milliwatts=rails(line),
    )
    return None if sample == Sample() else sample


def temperatures(line: str) -> dict[str, float]:
    """`cpu@42.5C` and `cpu@42.5C/43C`; a sensor at -256 is left out."""
    pairs = re.findall(r"(?<![\w%])([A-Za-z]\w*)@(-?[\d.]+)C\b", line)
    return {name: float(value) for name, value in pairs if float(value) > -250}


def rails(line: str) -> dict[str, int]:
    """Power now of each rail: `VDD_IN 3500mW/3400mW`, older `POM_5V_IN 2500/2400`, newer a third value."""
    found = re.findall(r"\b([A-Z][A-Z0-9_]+) (\d+)(?:mW)?/(\d+)(?:mW)?(?![\dMk])", line)
    return {name: int(now) for name, now, _ in found}


def ina3221(text: str) -> dict[str, float]:
    """`VDD_IN 5040 700` (mV, mA) -> {"VDD_IN": 3528.0} milliwatts; lines that are no reading are left out."""
    rows = re.findall(r"^(\S.*?) (\d+) (\d+)$", text, re.M)
    return {label: int(millivolts) * int(milliamperes) / 1000 for label, millivolts, milliamperes in rows}


def total_milliwatts(power: Mapping[str, float]) -> float | None:
    """What feeds the whole board, of the powers of single rails; None when no total rail is among them."""
    return next((power[rail] for rail in TOTAL_RAILS if rail in power), None)


def power_mode(text: str) -> str | None:
    """`nvpmodel -q`: `NV Power Mode: MAXN` -> MAXN."""
    found = re.search(r"NV Power Mode:\s*(\S.*)", text)
    return found[1].strip() if found else None
