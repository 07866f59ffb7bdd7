"""The real adb (29 of Debian, and the one in adbutils) against a peer of our own in its own network."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import adbutils
import lab_machine as machine
import pytest

from edgecomp import decoding_on_device
from edgecomp.devices import checkup, faults, profiler
from edgecomp.devices.adb import AdbDevice, failure
from edgecomp.devices.host import Request
from edgecomp.errors import DeviceError, InputError
from edgecomp.language.generation import GenerationSession
from edgecomp.language.sampling import Sampling

sys.path.insert(0, str(Path(__file__).parents[1] / "devices"))
from tiny_artifacts import write_onnx, write_tflite
from tiny_decoders import PROMPT, write

WELL, UNAUTHORIZED, OFFLINE, UNPLUGGED, FULL = range(6001, 6006)
FAULTS = [
    f"{WELL}",
    f"{UNAUTHORIZED}:unauthorized",
    f"{OFFLINE}:offline",
    f"{UNPLUGGED}:unplug:1000000",
    f"{FULL}:nospace",
]
BUNDLED = Path(adbutils.__file__).parent / "binaries" / "adb"
ADBS = {"system": "/usr/bin/adb", "bundled": str(BUNDLED)}


@dataclass
class Network:
    """A network namespace with only loopback, where an adb server and the peers live."""

    process: subprocess.Popen[bytes]
    inside: int
    adb: Path

    def devices(self) -> str:
        return subprocess.run([self.adb, "devices"], capture_output=True, text=True, timeout=30).stdout


def started(name: str, folder: Path) -> Network:
    peer = Path(__file__).with_name("adbd_peer.py")
    peers = " ".join(f"--device {words}" for words in FAULTS)
    script = f"ip link set lo up; exec {sys.executable} {peer} --root /mnt/board {peers}"
    inner = folder / "start.sh"
    inner.write_text(f"#!/bin/sh\n{script}\n")
    inner.chmod(0o755)
    process = machine.enter(f"unshare -n {inner}")
    inside = child_of(process.pid)
    wrapper = folder / "adb"
    home = folder / "home"
    home.mkdir()
    settings = f"HOME={home} ADB_MDNS=0 ADB_MDNS_AUTO_CONNECT=0 ADB_LOCAL_TRANSPORT_MAX_PORT=5553"
    wrapper.write_text(f'#!/bin/sh\nexec nsenter -t {inside} -n env {settings} {ADBS[name]} "$@"\n')
    wrapper.chmod(0o755)
    network = Network(process, inside, wrapper)
    subprocess.run([wrapper, "start-server"], capture_output=True, check=True, timeout=60)
    machine.wait_for(lambda: b"connected" in connect(wrapper, WELL), 20, "the adb peer")
    for port in (UNAUTHORIZED, OFFLINE, UNPLUGGED, FULL):
        connect(wrapper, port)
    return network


def connect(adb: Path, port: int) -> bytes:
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run([adb, "connect", f"127.0.0.1:{port}"], capture_output=True, timeout=12)
        return done.stdout if b"cannot" not in done.stdout and b"failed" not in done.stdout else b""
    return b""


def child_of(pid: int) -> int:
    """The process that `unshare -f` started: it is in the new namespaces."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    machine.wait_for(lambda: bool(children.read_text().split()), 10, "unshare")
    child = int(children.read_text().split()[0])
    own = Path("/proc/self/ns/net").readlink()
    machine.wait_for(lambda: Path(f"/proc/{child}/ns/net").readlink() != own, 10, "the network namespace")
    return child


@pytest.fixture(scope="module", params=sorted(ADBS))
def network(
    request: pytest.FixtureRequest, lab: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Network]:
    running = started(request.param, tmp_path_factory.mktemp("adb"))
    yield running
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([running.adb, "kill-server"], capture_output=True, timeout=10)
    running.process.kill()
    running.process.wait()


Make = Callable[..., AdbDevice]


@pytest.fixture
def phone(network: Network) -> Make:
    def make(port: int = WELL, **settings: object) -> AdbDevice:
        return AdbDevice("phone", f"127.0.0.1:{port}", adb=str(network.adb), **settings)  # type: ignore[arg-type]

    return make


def test_a_command_gives_code_and_two_streams(phone: Make) -> None:
    lines: list[str] = []
    result = phone().run(["sh", "-c", "uname -m; echo c >&2; exit 7"], 20, lines.append)
    assert (result.exit_code, result.stdout, result.stderr) == (7, "aarch64\n", "c\n")
    assert lines == ["aarch64"]
    assert phone().run(["sh", "-c", "exit 1"], 20).exit_code == 1
    assert phone().run(["sh", "-c", "kill -SEGV $$"], 20).exit_code == -11


def test_files_arrive_whole_and_come_back(phone: Make, tmp_path: Path) -> None:
    source = tmp_path / "big.bin"
    source.write_bytes(os.urandom(3_000_000))
    device = phone()
    path = device.stage(source)
    assert device.stage(source) == path
    device.pull(path, tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == source.read_bytes()
    with pytest.raises(DeviceError, match="no file /nothing"):
        device.pull("/nothing", tmp_path / "x")


def test_an_unauthorized_host_is_told_what_to_do(phone: Make) -> None:
    with pytest.raises(faults.AuthenticationError, match="unlock its screen"):
        phone(UNAUTHORIZED).run(["true"], 10)


def test_an_offline_device(phone: Make) -> None:
    with pytest.raises((faults.OfflineError, faults.UnreachableError)) as caught:
        phone(OFFLINE).run(["true"], 10)
    assert "127.0.0.1:6003" in str(caught.value)


def test_a_device_that_is_not_attached(phone: Make) -> None:
    with pytest.raises(faults.UnreachableError, match="adb sees no device"):
        phone(6099).run(["true"], 10)


def test_a_full_device(phone: Make, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 1000)
    with pytest.raises(faults.NoSpaceError, match="is full"):
        phone(FULL).push(tmp_path / "f", "/data/local/tmp/f")


def test_a_device_unplugged_in_a_push(phone: Make, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(os.urandom(4_000_000))
    with pytest.raises((faults.DroppedError, faults.OfflineError, faults.UnreachableError)):
        phone(UNPLUGGED).push(tmp_path / "f", "/data/local/tmp/f")


def test_two_devices_and_no_serial(network: Network) -> None:
    done = subprocess.run([network.adb, "shell", "true"], capture_output=True, text=True, timeout=30)
    error = failure("?", done.stderr)
    assert isinstance(error, InputError) and "--adb SERIAL" in str(error)


def test_a_hung_command_is_ended_on_the_device(phone: Make) -> None:
    with pytest.raises(faults.TookTooLongError, match="longer than 1 s"):
        phone().run(["sh", "-c", "sleep 321 & sleep 322; wait"], 1)
    assert gone("sleep 32")


def gone(words: str) -> bool:
    end = time.monotonic() + 12
    while time.monotonic() < end:
        found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        if not any(words in line for line in found.splitlines()):
            return True
        time.sleep(0.3)
    return False


def test_an_interrupted_host_leaves_nothing_running(phone: Make) -> None:
    def interrupt(line: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        phone().run(["sh", "-c", "sleep 345 & sleep 1; echo ready; wait"], 60, interrupt)
    assert gone("sleep 345")


@pytest.mark.parametrize("network", ["bundled"], indirect=True)
def test_closing_the_device_ends_a_run_in_another_thread(phone: Make) -> None:
    device = phone()
    threading.Timer(1.0, device.close).start()
    with pytest.raises(DeviceError):
        device.run(["sh", "-c", "sleep 356"], 60)
    assert gone("sleep 356")


@pytest.mark.slow
@pytest.mark.parametrize("network", ["bundled"], indirect=True)
def test_the_agent_runs_both_formats_where_python_is(phone: Make, tmp_path: Path) -> None:
    device = phone()
    assert device.probe()["emulated"]
    for artifact in (write_onnx(tmp_path / "m.onnx"), write_tflite(tmp_path / "m.tflite")):
        p = profiler.profile(device, artifact)
        assert p["device"]["kind"] == "adb" and p["latency_ms"] is None and p["runtime"]["version"]


@pytest.mark.slow
@pytest.mark.parametrize("network", ["bundled"], indirect=True)
def test_a_decoder_writes_the_text_of_this_machine_until_a_stop_string(phone: Make, tmp_path: Path) -> None:
    artifact = write(tmp_path, ("tflite-fp32",))["tflite-fp32"]
    how = Sampling(temperature=0.9, top_k=60, seed=5, max_tokens=16)
    expected = GenerationSession.open(artifact).generate(PROMPT, how)
    found = decoding_on_device.generate(phone(), artifact, PROMPT, how)
    assert found["text"] == expected and found["device"]["kind"] == "adb" and found["first_token_s"] is None
    stop = replace(how, max_tokens=40, stop=(expected[2:4],))
    found = decoding_on_device.generate(phone(), artifact, PROMPT, stop)
    assert found["text"] == expected[: expected.find(expected[2:4])] and found["ended"] == "stop"
    with pytest.raises(faults.RuntimeMissingError, match="install Python 3.9"):
        decoding_on_device.generate(phone(interpreter="no-python"), artifact, PROMPT)


@pytest.mark.parametrize("network", ["bundled"], indirect=True)
def test_without_python_and_runner_the_way_out_is_named(phone: Make, tmp_path: Path) -> None:
    device = phone(interpreter="no-python")
    with pytest.raises(faults.RuntimeMissingError, match="--set runner=PATH"):
        profiler.profile(device, write_onnx(tmp_path / "m.onnx"))
    assert checkup.lacking("phone", device.probe())[0]["what"].startswith("Python")


REPLAY = """#!/bin/sh
case "$1" in --graph=*) [ -f "${1#--graph=}" ] || exit 1;; esac
cat <<'END'
INFO: count=4 first=1300 curr=1210 min=1200 max=1300 avg=1240 std=40 p5=1201 median=1230 p95=1290
INFO: count=50 first=1240 curr=1250 min=1199 max=1402 avg=1251.5 std=30 p5=1205 median=1248 p95=1330
INFO: Inference timings in us: Init: 15210, First inference: 1900, Warmup (avg): 1240, Inference (avg): 1251.5
END
"""


@pytest.mark.parametrize("network", ["bundled"], indirect=True)
def test_a_replayed_benchmark_model_is_run_and_read(phone: Make, tmp_path: Path) -> None:
    runner = tmp_path / "benchmark_model"
    runner.write_text(REPLAY)
    device = phone(runner=runner)
    found = device.measure(Request(write_tflite(tmp_path / "m.tflite")))[0]
    assert found.summary == {"min": 1.199, "max": 1.402, "mean": 1.2515, "p50": 1.248, "p95": 1.33}
    assert (found.init_ms, found.first_ms) == (15.21, 1.9)


DUMPSYS = """#!/bin/sh
[ "$1" = meminfo ] && [ -d /proc/$2 ] && echo "           TOTAL PSS:    12345            TOTAL RSS:    20000"
"""


@pytest.mark.parametrize("network", ["bundled"], indirect=True)
def test_the_runner_s_memory_is_asked_of_kernel_and_dumpsys(phone: Make, tmp_path: Path) -> None:
    runner = tmp_path / "benchmark_model"
    runner.write_text(REPLAY + "sleep 3\n")
    (tmp_path / "dumpsys").write_text(DUMPSYS)
    device = phone(runner=runner)
    device.push(tmp_path / "dumpsys", "/usr/local/bin/dumpsys")
    device.run(["chmod", "755", "/usr/local/bin/dumpsys"], 20)
    try:
        found = device.measure(Request(write_tflite(tmp_path / "m.tflite")))[0]
    finally:
        device.run(["rm", "/usr/local/bin/dumpsys"], 20)
    assert found.pss_bytes == 12345 * 1024
    assert found.peak_rss_bytes is not None and found.peak_rss_bytes > 100_000, "a shell's VmHWM"


@pytest.mark.parametrize("network", ["bundled"], indirect=True)
def test_a_runner_that_fails_says_why(phone: Make, tmp_path: Path) -> None:
    runner = tmp_path / "benchmark_model"
    for text, error, words in (
        ("echo 'ERROR: Failed to load model' >&2; exit 1", faults.ModelRefusedError, "Failed to load model"),
        ("kill -SEGV $$", faults.ModelCrashError, "SIGSEGV"),
        ("echo something else", faults.OutputFormError, "something else"),
    ):
        runner.write_text(f"#!/bin/sh\n{text}\n")
        with pytest.raises(error, match=words):
            phone(runner=runner).measure(Request(write_tflite(tmp_path / "m.tflite")))
