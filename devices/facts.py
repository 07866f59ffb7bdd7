"""Facts of a machine from one shell script, so that no Python is needed there to be asked.

The script prints `== name` and then raw text (kernel files, `uname`, `getprop`, `sysctl`); `parse` reads it.
Forms: Linux's /proc/cpuinfo on x86 and Arm, device trees, Android's properties, macOS's sysctl.
"""

from __future__ import annotations

import re
from typing import Any

# Features that decide which integer kernels run, under the names that /proc/cpuinfo and sysctl use.
_FEATURES = {
    "asimddp": "dotprod",
    "FEAT_DotProd": "dotprod",
    "i8mm": "i8mm",
    "FEAT_I8MM": "i8mm",
    "sve": "sve",
    "sve2": "sve2",
    "bf16": "bf16",
    "FEAT_BF16": "bf16",
    "asimdhp": "fp16",
    "FEAT_FP16": "fp16",
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "amx_int8": "amx_int8",
}

# Part numbers of Arm's own cores (implementer 0x41), from the Main ID Register of each technical manual.
_ARM_PARTS = {
    0xD03: "Cortex-A53",
    0xD04: "Cortex-A35",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD0D: "Cortex-A77",
    0xD40: "Neoverse-V1",
    0xD41: "Cortex-A78",
    0xD42: "Cortex-A78AE",
    0xD44: "Cortex-X1",
    0xD46: "Cortex-A510",
    0xD47: "Cortex-A710",
    0xD48: "Cortex-X2",
    0xD49: "Neoverse-N2",
}

_RUNTIMES = ("ai-edge-litert", "tflite-runtime", "tensorflow", "onnxruntime", "coremltools", "numpy")

_ASK_PYTHON = (
    "import sys\n"
    "from importlib import metadata\n"
    "print('python', sys.version.split()[0])\n"
    f"for n in {_RUNTIMES!r}:\n"
    "    try: print(n, metadata.version(n))\n"
    "    except metadata.PackageNotFoundError: pass\n"
)


def script(python: tuple[str, ...]) -> str:
    """The shell script to run on the device. `python`: the words that start Python there."""
    words = " ".join("'" + word.replace("'", "'\\''") + "'" for word in python)
    return rf"""
say() {{ echo "== $1"; }}
say machine; uname -m; say system; uname -sr
say cpuinfo; cat /proc/cpuinfo 2>/dev/null
say devicetree; tr '\0' '\n' < /sys/firmware/devicetree/base/model 2>/dev/null
say compatible; tr '\0' '\n' < /sys/firmware/devicetree/base/compatible 2>/dev/null
say product; cat /sys/class/dmi/id/product_name 2>/dev/null
say os; cat /etc/os-release 2>/dev/null
say memory; cat /proc/meminfo 2>/dev/null
say governor; cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor 2>/dev/null
say temperatures; for z in /sys/class/thermal/thermal_zone*; do
  [ -r "$z/temp" ] && echo "$(cat "$z/type") $(cat "$z/temp" 2>/dev/null)"; done
say shell; head -c 60 /proc/$$/cmdline 2>/dev/null; echo
say glibc; getconf GNU_LIBC_VERSION 2>/dev/null
say free; df -Pk . 2>/dev/null
say sysctl; command -v sysctl >/dev/null && sysctl hw.model hw.memsize hw.ncpu machdep.cpu.brand_string \
  hw.optional.arm 2>/dev/null
say sw_vers; command -v sw_vers >/dev/null && sw_vers 2>/dev/null
say getprop; command -v getprop >/dev/null && getprop 2>/dev/null
say tools; for t in vcgencmd tegrastats trtexec nvpmodel jetson_clocks taskset timeout setsid; do
  command -v $t; done
say python; {words} -c "{_ASK_PYTHON}" 2>/dev/null
say end
"""


def parse(text: str) -> dict[str, Any]:
    """The script's output as facts; what was not told is None (or an empty list).

    Keys: model, soc, cores, isa, isa_features, os, ram_bytes, free_bytes, governor, temperatures, emulated,
    glibc, python, runtimes, tools.
    """
    parts = _sections(text)
    machine = parts.get("machine", "").strip()
    cpu = parts.get("cpuinfo", "")
    android = dict(re.findall(r"\[([\w.]+)\]: \[(.*)\]", parts.get("getprop", "")))
    apple = dict(re.findall(r"^([\w.]+): (.*)$", parts.get("sysctl", ""), re.M))
    versions = dict(line.split(" ", 1) for line in parts.get("python", "").splitlines() if " " in line)
    features = _features(cpu, apple)
    return {
        "model": _model(parts, cpu, android, apple),
        "soc": _soc(parts, cpu, android, apple),
        "cores": _cores(cpu, apple),
        "isa": machine or None,
        "isa_features": features,
        "os": _os(parts, android),
        "ram_bytes": _kilobytes(r"MemTotal:\s+(\d+)", parts.get("memory", ""), apple),
        "free_bytes": _free(parts.get("free", "")),
        "governor": _one_or_many(parts.get("governor", "")),
        "temperatures": _temperatures(parts.get("temperatures", "")),
        "emulated": "qemu" in parts.get("shell", "").split("\0")[0],
        "glibc": parts.get("glibc", "").strip().removeprefix("glibc ") or None,
        "python": versions.pop("python", None),
        "runtimes": versions,
        "tools": [line.rsplit("/", 1)[-1] for line in parts.get("tools", "").split()],
    }


def _sections(text: str) -> dict[str, str]:
    pieces = re.split(r"^== (\w+)\n", text, flags=re.M)
    return dict(zip(pieces[1::2], pieces[2::2], strict=False))


def _field(name: str, text: str) -> str | None:
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.M)
    return found.group(1).strip() if found else None


def _model(parts: dict[str, str], cpu: str, android: dict[str, str], apple: dict[str, str]) -> str | None:
    tree = parts.get("devicetree", "").strip()
    name = android.get("ro.product.model") or tree or apple.get("hw.model")
    return name or _field("model name", cpu) or parts.get("product", "").strip() or None


def _soc(parts: dict[str, str], cpu: str, android: dict[str, str], apple: dict[str, str]) -> str | None:
    if android:
        return android.get("ro.soc.model") or android.get("ro.board.platform")
    if apple:
        return apple.get("machdep.cpu.brand_string")
    codes = re.findall(r"^CPU part\s*:\s*(0x[0-9a-fA-F]+)", cpu, re.M)
    if _field("CPU implementer", cpu) == "0x41" and codes:
        names = sorted({_ARM_PARTS.get(int(code, 16), f"Arm part {code}") for code in codes})
        return " + ".join(names)
    chips = [line.split(",")[-1] for line in parts.get("compatible", "").split()]
    return chips[-1] if chips else _field("model name", cpu)


def _cores(cpu: str, apple: dict[str, str]) -> int | None:
    count = len(re.findall(r"^processor\s*:", cpu, re.M))
    return count or (int(apple["hw.ncpu"]) if "hw.ncpu" in apple else None)


def _features(cpu: str, apple: dict[str, str]) -> list[str]:
    words = (_field("Features", cpu) or _field("flags", cpu) or "").split()
    words += [key.rsplit(".", 1)[-1] for key, value in apple.items() if value == "1"]
    return sorted({_FEATURES[word] for word in words if word in _FEATURES})


def _os(parts: dict[str, str], android: dict[str, str]) -> str | None:
    if android:
        release, sdk = android.get("ro.build.version.release"), android.get("ro.build.version.sdk")
        return f"Android {release} (SDK {sdk})"
    mac = dict(re.findall(r"^(\w+):\s*(.+)$", parts.get("sw_vers", ""), re.M))
    if mac:
        return f"{mac.get('ProductName')} {mac.get('ProductVersion')}"
    pretty = re.search(r'^PRETTY_NAME="?([^"\n]+)', parts.get("os", ""), re.M)
    return pretty.group(1) if pretty else parts.get("system", "").strip() or None


def _kilobytes(pattern: str, text: str, apple: dict[str, str]) -> int | None:
    found = re.search(pattern, text)
    if found:
        return int(found.group(1)) * 1024
    return int(apple["hw.memsize"]) if "hw.memsize" in apple else None


def _free(text: str) -> int | None:
    found = re.search(r"\s(\d+)\s+\d+%", text)
    return int(found.group(1)) * 1024 if found else None


def _one_or_many(text: str) -> str | None:
    return "+".join(sorted(set(text.split()))) or None


def _temperatures(text: str) -> list[list[Any]]:
    rows = [line.rsplit(" ", 1) for line in text.splitlines()]
    return [[r[0], int(r[1]) / 1000] for r in rows if len(r) == 2 and re.fullmatch(r"-?\d+", r[1])]
