"""Facts of machines from recorded forms of what they print."""

from __future__ import annotations

from edgecomp.devices import facts

RASPBERRY_PI = """== machine
aarch64
== system
Linux 6.1.21-v8+
== cpuinfo
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU part\t: 0xd08

processor\t: 1
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU part\t: 0xd08

Model\t\t: Raspberry Pi 4 Model B Rev 1.4
== devicetree
Raspberry Pi 4 Model B Rev 1.4
== os
PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"
NAME="Debian GNU/Linux"
== memory
MemTotal:        3884404 kB
== governor
ondemand
ondemand
== temperatures
cpu-thermal 48199
== shell
sh\0-c\0true
== glibc
glibc 2.36
== free
Filesystem 1024-blocks Used Available Capacity Mounted on
/dev/root 30000000 10000000 18500000 36% /
== tools
/usr/bin/vcgencmd
/usr/bin/timeout
== python
python 3.11.2
ai-edge-litert 2.1.0
numpy 2.0.1
== end
"""

ANDROID = """== machine
aarch64
== cpuinfo
processor\t: 0
Features\t: fp asimd asimddp i8mm sve
== getprop
[ro.product.model]: [Pixel 8]
[ro.soc.model]: [Tensor G3]
[ro.build.version.release]: [14]
[ro.build.version.sdk]: [34]
"""

MAC = """== machine
arm64
== sysctl
hw.model: Mac14,2
hw.memsize: 17179869184
hw.ncpu: 8
machdep.cpu.brand_string: Apple M2
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SVE: 0
== sw_vers
ProductName:\t\tmacOS
ProductVersion:\t\t14.5
"""


def test_a_raspberry_pi() -> None:
    found = facts.parse(RASPBERRY_PI)
    assert found == {
        "model": "Raspberry Pi 4 Model B Rev 1.4",
        "soc": "Cortex-A72",
        "cores": 2,
        "isa": "aarch64",
        "isa_features": [],
        "os": "Debian GNU/Linux 12 (bookworm)",
        "ram_bytes": 3884404 * 1024,
        "free_bytes": 18500000 * 1024,
        "governor": "ondemand",
        "temperatures": [["cpu-thermal", 48.199]],
        "emulated": False,
        "glibc": "2.36",
        "python": "3.11.2",
        "runtimes": {"ai-edge-litert": "2.1.0", "numpy": "2.0.1"},
        "tools": ["vcgencmd", "timeout"],
    }


def test_a_phone() -> None:
    found = facts.parse(ANDROID)
    assert (found["model"], found["soc"], found["os"]) == ("Pixel 8", "Tensor G3", "Android 14 (SDK 34)")
    assert found["isa_features"] == ["dotprod", "i8mm", "sve"]
    assert found["python"] is None and found["runtimes"] == {}


def test_a_mac() -> None:
    found = facts.parse(MAC)
    assert (found["model"], found["soc"], found["os"]) == ("Mac14,2", "Apple M2", "macOS 14.5")
    assert (found["cores"], found["ram_bytes"]) == (8, 17179869184)
    assert found["isa_features"] == ["dotprod", "i8mm"]


def test_an_emulated_shell_is_told_by_its_command_line() -> None:
    assert facts.parse("== shell\n/usr/bin/qemu-aarch64-static\0/bin/sh\0-c")["emulated"]
    assert not facts.parse("== shell\nsh\0-c\0qemu")["emulated"]


def test_big_little_cores_are_all_named() -> None:
    text = "== cpuinfo\nCPU implementer\t: 0x41\nCPU part\t: 0xd05\nCPU part\t: 0xd0b\nCPU part\t: 0xfff\n"
    assert facts.parse(text)["soc"] == "Arm part 0xfff + Cortex-A55 + Cortex-A76"


def test_nothing_is_known_of_a_silent_machine() -> None:
    found = facts.parse("")
    assert found["model"] is None and found["cores"] is None and found["free_bytes"] is None
