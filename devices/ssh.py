"""A board over SSH: verified host keys, resumed uploads, remote work that is always ended."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self

import paramiko

from edgecomp import files
from edgecomp.devices import facts, remote, remote_machine
from edgecomp.devices.faults import DroppedError, NoSpaceError, UnreachableError, last_lines
from edgecomp.devices.ssh_connect import Connection, Login, resets
from edgecomp.devices.transport import OnLine, with_signal
from edgecomp.errors import DataError, DeviceError
from edgecomp.spec import CommandResult

_LOST = resets()
_ATTEMPTS = 4
_PIECE = 1 << 15


class SshDevice:
    """`edgecomp.devices.transport.Transport` over SSH (paramiko), with OpenSSH's server on the other side.

    `workdir`: where files go, below the login folder unless absolute. `interpreter`: the words that start
    Python there. `emulated`: the machine is an emulated one that does not show it (a virtual machine). `cpu`:
    the processor that its QEMU is asked for (QEMU_CPU); `cpus`: those of a comparison between processors.
    """

    kind = "ssh"
    SETTINGS: ClassVar[dict[str, type]] = {
        "address": str,
        "key": str,
        "jump": str,
        "workdir": str,
        "python": str,
        "emulated": bool,
        "cpu": str,
        "cpus": str,
    }

    def __init__(
        self,
        name: str,
        login: Login,
        *,
        workdir: str = ".edgecomp",
        interpreter: str = "python3",
        emulated: bool = False,
        cpu: str = "",
        cpus: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.login = login
        self.workdir = workdir
        self.interpreter = interpreter
        self.emulated = emulated or bool(cpu)
        self.cpu = cpu
        self.cpus = cpus
        self._open: Connection | None = None

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, Any]) -> Self:
        """A device from its entry in the inventory. Raises InputError when it has no usable address."""
        login = Login.parse(str(settings.get("address", "")))
        names = ("key", "jump", "known_hosts", "accept")
        places: dict[str, Any] = {key: str(settings[key]) for key in names if key in settings}
        return cls(
            name,
            replace(login, **places),
            workdir=str(settings.get("workdir", ".edgecomp")),
            interpreter=str(settings.get("python", "python3")),
            emulated=bool(settings.get("emulated", False)),
            cpu=str(settings.get("cpu", "")),
            cpus=tuple(str(settings.get("cpus", "")).split()),
        )

    def processors(self) -> list[Self]:
        """This machine once for each processor that its QEMU shall show; itself when none is named."""
        places: dict[str, Any] = {"workdir": self.workdir, "interpreter": self.interpreter}
        return [type(self)(f"{self.name}:{c}", self.login, cpu=c, **places) for c in self.cpus] or [self]

    def connect(self) -> None:
        """Log in now. Raises HostKeyError, AuthenticationError, UnreachableError."""
        self._connection()

    # -- commands

    def run(self, argv: Sequence[str], timeout_s: float, on_line: OnLine | None = None) -> CommandResult:
        connection = self._connection()
        reader = _Reader(on_line)
        channel = None
        try:
            channel = self._channel(connection)
            channel.exec_command(remote.wrapped(argv, timeout_s))
            channel.shutdown_write()
            code = reader.until_exit(channel, timeout_s + remote.GRACE_S + 2)
        except TimeoutError:
            raise remote_machine.too_long(self.name, argv, timeout_s) from None
        except _LOST as error:
            raise self._lost(f"while it ran {argv[0]}", error) from error
        finally:
            if channel is not None:
                channel.close()
            if not reader.finished:
                self._end(remote.groups(reader.stderr)[0])
        stderr = remote.groups(reader.stderr)[1]
        if code == remote.TIMED_OUT or (code == 137 and reader.seconds >= timeout_s):
            raise remote_machine.too_long(self.name, argv, timeout_s)
        return CommandResult(tuple(argv), with_signal(code), reader.stdout, stderr)

    def kill(self, group: int) -> None:
        self._end((group,))

    def _end(self, groups: Sequence[int]) -> None:
        """Kill process groups over a channel of its own, connecting anew when the connection is gone."""
        if not groups:
            return
        with contextlib.suppress(DeviceError, *_LOST):
            channel = self._channel(self._connection())
            channel.settimeout(10)
            channel.exec_command(remote.killing(groups))
            channel.recv_exit_status()
            channel.close()

    def _connection(self) -> Connection:
        if self._open is None or not self._open.alive:
            self.close()
            self._open = Connection(self.login)
        return self._open

    def _channel(self, connection: Connection) -> paramiko.Channel:
        transport = connection.client.get_transport()
        if transport is None:
            raise EOFError("the connection is closed")
        return transport.open_session(timeout=15)

    def _shell(self, line: str, timeout_s: float = 60.0) -> CommandResult:
        return remote_machine.shell(self, line, timeout_s)

    def _lost(self, when: str, error: BaseException) -> DroppedError:
        return DroppedError(
            f"the connection to device {self.name!r} was lost {when} "
            f"({error or type(error).__name__}); what ran there was ended. Check its network and power, then "
            "run the same command again"
        )

    # -- files

    def push(self, source: Path, destination: str) -> None:
        for file, place in remote_machine.each_file(source, destination):
            self._push_file(file, place)

    def _push_file(self, source: Path, destination: str) -> None:
        digest, size = files.sha256(source), source.stat().st_size
        if remote_machine.hash_of(self, destination) == (size, digest):
            return
        folder = str(PurePosixPath(destination).parent)
        self._make_room(folder, size)
        part = f"{destination}.{digest[:12]}.part"
        self._upload(source, part, size)
        arrived = remote_machine.hash_of(self, part)
        if arrived != (size, digest):
            free = self._free(folder)
            self._shell(remote.removing(part))
            if free is not None and free < size - (arrived[0] if arrived else 0):
                raise self._full(folder, size, free)
            raise DataError(
                f"{source} arrived on device {self.name!r} with another SHA-256 than it left with; its "
                "disk or memory is damaged: try again, or another storage"
            )
        with self._sftp() as sftp:
            sftp.posix_rename(part, destination)

    def _make_room(self, folder: str, size: int) -> None:
        result = self._shell(f"mkdir -p {shlex.quote(folder)}")
        if result.exit_code:
            raise DeviceError(
                f"cannot make folder {folder} on device {self.name!r}{last_lines(result.stderr)}; "
                "choose another with --workdir"
            )
        free = self._free(folder)
        if free is not None and free < size:
            raise self._full(folder, size, free)

    def _free(self, folder: str) -> int | None:
        return remote.free_bytes(self._shell(f"df -Pk {shlex.quote(folder)}").stdout)

    def _full(self, folder: str, size: int, free: int | None) -> NoSpaceError:
        return NoSpaceError(
            f"device {self.name!r} has {free if free is not None else 'too few'} bytes free in {folder} "
            f"and the file needs {size}; free some space there, or choose another folder with --workdir"
        )

    def _upload(self, source: Path, part: str, size: int) -> None:
        """Append to the partial file from where it ends; go on after a lost connection."""
        for attempt in range(_ATTEMPTS):
            try:
                self._append(source, part)
                return
            except _LOST as error:
                if self._open is not None and self._open.alive and isinstance(error, OSError):
                    folder = str(PurePosixPath(part).parent)
                    raise self._full(folder, size, self._free(folder)) from error
                if attempt == _ATTEMPTS - 1:
                    raise self._lost(f"while {source.name} was sent", error) from error
                time.sleep(attempt)

    def _append(self, source: Path, part: str) -> None:
        with self._sftp() as sftp, source.open("rb") as stream:
            try:
                there = sftp.stat(part).st_size or 0
            except FileNotFoundError:
                there = 0
            stream.seek(there)
            with sftp.open(part, "ab" if there else "wb") as target:
                target.set_pipelined(True)
                while piece := stream.read(_PIECE):
                    target.write(piece)

    @contextlib.contextmanager
    def _sftp(self) -> Any:
        transport = self._connection().client.get_transport()
        if transport is None:
            raise EOFError("the connection is closed")
        sftp = paramiko.SFTPClient.from_transport(transport)
        if sftp is None:
            raise UnreachableError(f"device {self.name!r} offers no SFTP; install openssh-sftp-server there")
        try:
            yield sftp
        finally:
            sftp.close()

    def pull(self, source: str, destination: Path) -> None:
        found = remote_machine.hash_of(self, source)
        if found is None:
            raise DeviceError(f"no file {source} on device {self.name!r}")
        try:
            with self._sftp() as sftp, files.atomic(destination) as temporary:
                sftp.get(source, str(temporary))
                if files.sha256(temporary) != found[1]:
                    raise DataError(f"{source} changed while it was fetched from device {self.name!r}")
        except (EOFError, paramiko.SSHException) as error:
            raise self._lost(f"while {source} was fetched", error) from error

    def stage(self, source: Path) -> str:
        path = remote_machine.staged_path(self.workdir, source)
        self.push(source, path)
        return path

    # -- the machine

    @property
    def runtime_folder(self) -> str:
        return remote_machine.runtime_folder(self.workdir)

    def python(self) -> tuple[str, ...]:
        shown = [f"QEMU_CPU={self.cpu}"] if self.cpu else []
        return remote_machine.python_words(self.workdir, self.interpreter, *shown)

    def probe(self) -> dict[str, Any]:
        """What the machine tells of itself; with `cpu`, the processor that it is asked to show."""
        found = facts.parse(self._shell(facts.script(self.python())).stdout)
        asked = {"soc": self.cpu, "isa_features": []} if self.cpu else {}
        return found | asked | {"emulated": found["emulated"] or self.emulated}

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


class _Reader:
    """Collects stdout and stderr of a channel and hands over whole lines."""

    def __init__(self, on_line: OnLine | None) -> None:
        self.on_line = on_line
        self.finished = False
        self.seconds = 0.0
        self._out = bytearray()
        self._err = bytearray()
        self._told = 0

    @property
    def stdout(self) -> str:
        return self._out.decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self._err.decode(errors="replace")

    def until_exit(self, channel: paramiko.Channel, limit_s: float) -> int:
        """Read until the command ended. Raises TimeoutError, or EOFError when the connection is lost."""
        start = time.monotonic()
        while not (
            channel.exit_status_ready() and not channel.recv_ready() and not channel.recv_stderr_ready()
        ):
            if not self._take(channel):
                if channel.closed and not channel.exit_status_ready():
                    raise EOFError("the channel was closed")
                time.sleep(0.01)
            if time.monotonic() - start > limit_s:
                raise TimeoutError
        while self._take(channel):
            continue
        code = channel.recv_exit_status()
        if code < 0:
            raise EOFError("the command ended without an exit code")
        self.finished, self.seconds = True, time.monotonic() - start
        return code

    def _take(self, channel: paramiko.Channel) -> bool:
        taken = False
        if channel.recv_ready():
            self._out += channel.recv(1 << 16)
            self._tell()
            taken = True
        if channel.recv_stderr_ready():
            self._err += channel.recv_stderr(1 << 16)
            taken = True
        return taken

    def _tell(self) -> None:
        while (end := self._out.find(b"\n", self._told)) >= 0:
            line = self._out[self._told : end].decode(errors="replace")
            self._told = end + 1
            if self.on_line:
                self.on_line(line)
