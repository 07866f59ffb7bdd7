"""Build the emulated Arm device of the tests: an arm64 Debian root, wheels, an identity, a QEMU plugin.

    python tests/lab/lab_build.py            # once; again it only checks

Needs root on Debian or Ubuntu; says why and does nothing elsewhere. The result is cached outside the
checkout, in $EDGECOMP_LAB or /var/cache/edgecomp-lab (about 450 MB; some two minutes the first time). System
packages are installed with apt-get. Packages of the root are only extracted, none of their scripts runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
LAB = Path(os.environ.get("EDGECOMP_LAB", "/var/cache/edgecomp-lab"))
ROOT = LAB / "root"
WHEELS = LAB / "wheels"
IDENTITY = LAB / "identity"
PLUGIN = LAB / "libcount.so"

# Command that proves a package to be there -> the Debian package.
SYSTEM = {
    "mmdebstrap": "mmdebstrap",
    "arch-test": "arch-test",
    "qemu-aarch64-static": "qemu-user-static",
    "qemu-aarch64": "qemu-user",
    "/usr/sbin/sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "adb": "adb",
    "ip": "iproute2",
    "gcc": "gcc",
}
PACKAGES = (
    "base-files,base-passwd,bash,coreutils,dash,debianutils,findutils,grep,gzip,hostname,libc-bin,libgomp1,"
    "libstdc++6,libgcc-s1,libpython3-stdlib,openssh-sftp-server,procps,python3,sed,tar,util-linux,passwd"
)
RUNTIMES = ("numpy", "onnxruntime", "ai-edge-litert")
PLATFORMS = ("manylinux2014", "manylinux_2_17", "manylinux_2_27", "manylinux_2_28", "manylinux_2_34")
BINFMT = Path("/proc/sys/fs/binfmt_misc")
# ELF header of a 64-bit little-endian Arm program; F: the interpreter is opened now, so chroots work.
ARM64 = (
    r":qemu-aarch64:M::\x7f\x45\x4c\x46\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    r":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
    r":/usr/bin/qemu-aarch64-static:F"
)


def why_not() -> str | None:
    """Why the device cannot be built here; None when it can."""
    if sys.platform != "linux":
        return f"the emulated Arm device needs Linux; this is {sys.platform}"
    if os.geteuid() != 0:
        return "the emulated Arm device needs root (chroot, mount and network namespaces)"
    if shutil.which("apt-get") is None:
        return "the emulated Arm device is built with apt-get, which is not here"
    if subprocess.run(["unshare", "-m", "-n", "-p", "-f", "true"], capture_output=True).returncode:
        return "this system does not allow new namespaces (unshare)"
    return None


def call(*argv: str | Path) -> None:
    """Run a command; its output goes to stderr, and a failure ends the build with its last lines."""
    done = subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-10:])
        raise RuntimeError(f"{' '.join(str(a) for a in argv)} ended with {done.returncode}:\n{tail}")


def note(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)


def install_system_packages() -> None:
    missing = sorted({package for command, package in SYSTEM.items() if shutil.which(command) is None})
    if not missing:
        return
    note(f"installing {', '.join(missing)}")
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    call("apt-get", "update", "-qq")
    call("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing)


def register_binfmt() -> None:
    """Let the kernel start arm64 programs. It lasts until the machine is restarted."""
    if not (BINFMT / "register").exists():
        call("mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT)
    if not (BINFMT / "qemu-aarch64").exists():
        (BINFMT / "register").write_text(ARM64)


def release() -> str:
    """The Debian release whose archive this host uses."""
    facts = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    return facts.get("VERSION_CODENAME", "bookworm").strip('"')


def extract_root(target: Path) -> None:
    note("extracting an arm64 root")
    options = ["--quiet", "--arch=arm64", "--variant=extract", f"--include={PACKAGES}"]
    call("mmdebstrap", *options, "--aptopt=APT::Install-Recommends false", release(), target)
    for name in ("bin", "sbin", "lib"):
        merge_into_usr(target, name)
    if not (target / "usr/bin/sh").exists():
        (target / "usr/bin/sh").symlink_to("dash")
    for name in (
        "root",
        "tmp",
        "proc",
        "sys",
        "dev",
        "etc",
        "opt",
        "data/local/tmp",
        "full",
        "usr/local/bin",
    ):
        (target / name).mkdir(parents=True, exist_ok=True)
    (target / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
    (target / "etc/group").write_text("root:x:0:\n")


def merge_into_usr(root: Path, name: str) -> None:
    """/bin -> /usr/bin, as a full installation has it."""
    old = root / name
    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, root / "usr" / name, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(old)
        old.symlink_to(f"usr/{name}")


def python_of(root: Path) -> str:
    """`3.11` of the root's Python."""
    return (root / "usr/bin/python3").readlink().name.removeprefix("python")


def fetch_wheels(target: Path, version: str) -> None:
    note("fetching aarch64 wheels")
    platforms = [word for p in PLATFORMS for word in ("--platform", f"{p}_aarch64")]
    options = ["--only-binary=:all:", "--python-version", version, "--dest", target]
    call(sys.executable, "-m", "pip", "download", "--quiet", *options, *platforms, *RUNTIMES)


def install_wheels(wheels: Path, target: Path) -> None:
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)


def write_identity(folder: Path) -> None:
    """/proc/cpuinfo and /sys in the form of a Raspberry Pi 4; with the host's, every runtime crashes."""
    cpu = [
        f"processor\t: {n}\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"
        "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\n"
        "CPU revision\t: 3\n\n"
        for n in range(4)
    ]
    put(folder / "proc/cpuinfo", "".join(cpu) + "Model\t\t: Emulated board of the edgecomp tests\n")
    base = folder / "sys/devices/system/cpu"
    for name in ("possible", "present", "online"):
        put(base / name, "0-3\n")
    put(base / "kernel_max", "255\n")
    for n in range(4):
        topology = {
            "core_id": n,
            "physical_package_id": 0,
            "core_siblings_list": "0-3",
            "thread_siblings_list": n,
        }
        frequency = {
            "scaling_governor": "ondemand",
            "scaling_cur_freq": 1500000,
            "scaling_max_freq": 1800000,
            "cpuinfo_max_freq": 1800000,
        }
        for name, value in topology.items():
            put(base / f"cpu{n}/topology/{name}", f"{value}\n")
        for name, value in frequency.items():
            put(base / f"cpu{n}/cpufreq/{name}", f"{value}\n")
        put(base / f"cpu{n}/online", "1\n")
        put(base / f"cpu{n}/regs/identification/midr_el1", "0x00000000410fd083\n")
    put(folder / "sys/class/thermal/thermal_zone0/type", "cpu-thermal\n")
    put(folder / "sys/class/thermal/thermal_zone0/temp", "48199\n")
    put(folder / "sys/firmware/devicetree/base/model", "Emulated board of the edgecomp tests\0")


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def compile_plugin(target: Path) -> None:
    call("gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", HERE / "count.c", "-o", target)


def recipe() -> str:
    """What the cache was made from; another one is built anew."""
    sources = [Path(__file__).read_bytes(), (HERE / "count.c").read_bytes()]
    return hashlib.sha256(b"".join(sources)).hexdigest()


@contextmanager
def alone() -> Iterator[None]:
    """One builder at a time: test workers start together."""
    LAB.mkdir(parents=True, exist_ok=True)
    with (LAB / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure() -> None:
    """Build what is missing. Raises RuntimeError with the command that failed."""
    with alone():
        install_system_packages()
        register_binfmt()
        stamp = LAB / "recipe"
        if stamp.exists() and stamp.read_text() == recipe():
            return
        for old in (ROOT, WHEELS, IDENTITY):
            shutil.rmtree(old, ignore_errors=True)
        extract_root(ROOT)
        fetch_wheels(WHEELS, python_of(ROOT))
        install_wheels(WHEELS, ROOT / "opt/runtimes")
        put(ROOT / "usr/lib/python3/dist-packages/runtimes.pth", "/opt/runtimes\n")
        write_identity(IDENTITY)
        # For programs that run without a chroot (qemu -L): QEMU looks below the root first.
        shutil.copytree(IDENTITY, ROOT, dirs_exist_ok=True)
        compile_plugin(PLUGIN)
        stamp.write_text(recipe())


def main() -> int:
    reason = why_not()
    if reason:
        note(f"not built: {reason}; the tests that need it are skipped")
        return 0
    try:
        ensure()
    except (RuntimeError, OSError) as error:
        note(str(error))
        return 1
    note(f"ready in {LAB}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
