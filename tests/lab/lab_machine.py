"""Starts the emulated Arm device: namespaces of its own, OpenSSH on loopback, and a link that can fail."""

from __future__ import annotations

import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import lab_build as build

_ENTER = """
set -e
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/board
mount --bind {root} /mnt/board
for name in root tmp data/local/tmp run; do
  mkdir -p /mnt/board/$name; mount -t tmpfs tmpfs /mnt/board/$name
done
mount -t tmpfs -o size=4m tmpfs /mnt/board/full
mount --bind /dev /mnt/board/dev
mount -t proc proc /mnt/board/proc
mount -t proc proc /proc
mount --bind {identity}/proc/cpuinfo /mnt/board/proc/cpuinfo
mount -t tmpfs tmpfs /mnt/board/sys
cp -r {identity}/sys/. /mnt/board/sys/
mkdir -p /run/sshd
exec {command}
"""

_SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
ChrootDirectory /mnt/board
Subsystem sftp /usr/lib/openssh/sftp-server
MaxSessions 20
MaxStartups 100
SetEnv QEMU_CPU={cpu} PATH=/usr/local/bin:/usr/bin:/bin
LogLevel ERROR
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(ready: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} was not ready after {seconds} s")
        time.sleep(0.05)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def enter(command: str) -> subprocess.Popen[bytes]:
    """Start a command in mount and process namespaces where /mnt/board is the device's root."""
    script = _ENTER.format(root=build.ROOT, identity=build.IDENTITY, command=command)
    argv = ["unshare", "-m", "-p", "-f", "--kill-child", "--propagation", "private", "sh", "-c", script]
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)


@dataclass
class Board:
    """A running device. `folder` holds its keys; a login needs `key` and the `known_hosts` file."""

    folder: Path
    cpu: str = "cortex-a72"
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def key(self) -> Path:
        return self.folder / "client_key"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("host_key", "client_key"):
            make_key(self.folder / name)
        shutil.copyfile(self.folder / "client_key.pub", self.folder / "authorized_keys")
        self.trust(self.port)
        config = self.folder / "sshd_config"
        facts = {"port": self.port, "folder": self.folder, "cpu": self.cpu}
        config.write_text(_SSHD.format(**facts))
        self.process = enter(f"/usr/sbin/sshd -D -E {self.folder}/sshd.log -f {config}")
        wait_for(lambda: answers(self.port), 20, "sshd of the board")

    def trust(self, port: int, host_key: Path | None = None) -> None:
        """Put the host key into known_hosts for a port on loopback (a link has one of its own)."""
        words = (host_key or self.folder / "host_key").with_suffix(".pub").read_text().split()
        with self.known_hosts.open("a") as stream:
            stream.write(f"[127.0.0.1]:{port} {words[0]} {words[1]}\n")

    def processes(self) -> list[str]:
        """Command lines of the programs that run on the device (its server and ours left out)."""
        if self.process is None:
            return []
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        space = Path(f"/proc/{children[0]}/ns/pid").readlink() if children else None
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "ns/pid").readlink() == space:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append(line.strip())
            except OSError:
                continue
        return [line for line in found if line and "sshd" not in line]

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


def make_key(path: Path, passphrase: str = "") -> None:
    if not path.exists():
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", "lab", "-f", str(path)]
        subprocess.run(argv, check=True)


class Link:
    """A TCP relay in front of a port: it can be cut after so many bytes, or freeze with everything open."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.cut_after: int | None = None
        self.frozen = False
        self.carried = 0
        self.cuts = 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.server.getsockname()[1])
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.server.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            self.pairs.append((near, far))
            threading.Thread(target=self._relay, args=(near, far), daemon=True).start()

    def _relay(self, near: socket.socket, far: socket.socket) -> None:
        other = {near: far, far: near}
        try:
            while True:
                for side in select.select([near, far], [], [], 0.2)[0]:
                    if self.frozen:
                        time.sleep(0.05)
                        continue
                    data = side.recv(1 << 16)
                    if not data:
                        return
                    other[side].sendall(data)
                    self.carried += len(data)
                    if self.cut_after is not None and self.carried > self.cut_after:
                        self.cut_after = None
                        self.cut()
        except (OSError, ValueError):
            return
        finally:
            near.close()
            far.close()

    def cut(self) -> None:
        self.cuts += 1
        for pair in self.pairs:
            for side in pair:
                try:
                    side.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
        self.pairs.clear()

    def close(self) -> None:
        self.server.close()
        self.cut()
