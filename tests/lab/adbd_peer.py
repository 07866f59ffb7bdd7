"""A peer that speaks the adb protocol on loopback, so that the real adb can be tested without a phone.

    python adbd_peer.py --root /mnt/board --device PORT[:FAULT[:BYTES]] ...

Written from Android's protocol.txt, services.txt and sync.txt: messages CNXN, AUTH, OPEN, OKAY, WRTE, CLSE;
services shell (version 2), exec and sync (STAT, SEND, RECV). Commands run in a chroot at ROOT. Faults:
unauthorized (no key is ever accepted), offline (no answer to CNXN), unplug (the connection ends after so
many bytes were received), nospace (SEND fails). It is a replay of a protocol, not an Android device.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import select
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path

MAX = 256 * 1024
VERSION = 0x01000001
NAMES = ("name=peer", "model=Edgecomp_Peer", "device=peer")
BANNER = ("device::" + "".join(f"ro.product.{name};" for name in NAMES) + "features=shell_v2,cmd").encode()
CNXN, AUTH, OPEN, OKAY, WRTE, CLSE = (
    struct.unpack("<I", word)[0] for word in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"WRTE", b"CLSE")
)
STDOUT, STDERR, EXIT = 1, 2, 3


class Stream:
    """One opened service: bytes in order in both directions, one unacknowledged write at a time."""

    def __init__(self, connection: Connection, ours: int, theirs: int) -> None:
        self.connection, self.ours, self.theirs = connection, ours, theirs
        self.received: queue.Queue[bytes | None] = queue.Queue()
        self.acknowledged = threading.Semaphore(0)
        self.closed = False
        self.process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), MAX):
            if self.closed:
                raise BrokenPipeError
            self.connection.send(WRTE, self.ours, self.theirs, data[start : start + MAX])
            self.acknowledged.acquire()

    def read(self, count: int) -> bytes:
        while len(self._rest) < count:
            data = self.received.get()
            if data is None:
                raise EOFError
            self._rest += data
        found, self._rest = self._rest[:count], self._rest[count:]
        return found

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.connection.send(CLSE, self.ours, self.theirs)

    def hang_up(self) -> None:
        """The other side closed: as adbd does, the shell's group gets SIGHUP."""
        self.closed = True
        self.received.put(None)
        self.acknowledged.release()
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGHUP)


class Connection:
    def __init__(self, peer: socket.socket, root: Path, fault: str, limit: int) -> None:
        self.peer, self.root, self.fault, self.limit = peer, root, fault, limit
        self.lock = threading.Lock()
        self.streams: dict[int, Stream] = {}
        self.opened = 0
        self.received = 0

    def send(self, command: int, first: int, second: int, data: bytes = b"") -> None:
        check = sum(data) & 0xFFFFFFFF
        head = struct.pack("<6I", command, first, second, len(data), check, command ^ 0xFFFFFFFF)
        with self.lock:
            self.peer.sendall(head + data)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.peer.recv(min(count - len(data), 1 << 16))
            if not piece:
                raise EOFError
            data += piece
        return data

    def serve(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                command, first, second, length, _, _ = struct.unpack("<6I", self._exactly(24))
                data = self._exactly(length)
                self.received += length
                if self.fault == "unplug" and self.received > self.limit:
                    break
                self._handle(command, first, second, data)
        self.peer.close()
        for stream in list(self.streams.values()):
            stream.hang_up()

    def _handle(self, command: int, first: int, second: int, data: bytes) -> None:
        if command == CNXN and self.fault == "unauthorized":
            self.send(AUTH, 1, 0, os.urandom(20))
        elif command == CNXN and self.fault != "offline":
            self.send(CNXN, VERSION, MAX, BANNER)
        elif command == AUTH and first == 2:
            self.send(AUTH, 1, 0, os.urandom(20))
        elif command == OPEN:
            self.opened += 1
            stream = self.streams[self.opened] = Stream(self, self.opened, first)
            self.send(OKAY, stream.ours, stream.theirs)
            service = data.rstrip(b"\0").decode()
            threading.Thread(target=self._service, args=(stream, service), daemon=True).start()
        elif second in self.streams:
            self._to_stream(command, self.streams[second], data)

    def _to_stream(self, command: int, stream: Stream, data: bytes) -> None:
        if command == WRTE:
            stream.received.put(data)
            self.send(OKAY, stream.ours, stream.theirs)
        elif command == OKAY:
            stream.acknowledged.release()
        elif command == CLSE:
            del self.streams[stream.ours]
            if not stream.closed:
                self.send(CLSE, stream.ours, stream.theirs)
            stream.hang_up()

    def _service(self, stream: Stream, service: str) -> None:
        with contextlib.suppress(EOFError, BrokenPipeError):
            if service.startswith(("shell", "exec")):
                self._shell(stream, service)
            elif service == "sync:":
                Sync(stream, self.root, self.fault).serve()
            stream.close()

    def _shell(self, stream: Stream, service: str) -> None:
        head, _, command = service.partition(":")
        packets = "v2" in head
        process = stream.process = subprocess.Popen(
            ["/usr/sbin/chroot", str(self.root), "/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
        )
        if process.stdout is None or process.stderr is None:
            return
        kinds = {process.stdout.fileno(): STDOUT, process.stderr.fileno(): STDERR}
        while kinds:
            for number in select.select(list(kinds), [], [])[0]:
                data = os.read(number, 1 << 16)
                if not data:
                    del kinds[number]
                elif packets:
                    stream.write(struct.pack("<BI", kinds[number], len(data)) + data)
                else:
                    stream.write(data)
        code = process.wait()
        if packets:
            stream.write(struct.pack("<BIB", EXIT, 1, code & 255))


class Sync:
    """The file service: four letters, a length, and what they say."""

    def __init__(self, stream: Stream, root: Path, fault: str) -> None:
        self.stream, self.root, self.fault = stream, root, fault

    def serve(self) -> None:
        while True:
            request, length = struct.unpack("<4sI", self.stream.read(8))
            if request == b"QUIT":
                return
            argument = self.stream.read(length).decode()
            {b"STAT": self._stat, b"SEND": self._receive, b"RECV": self._give}[request](argument)

    def _path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def _stat(self, name: str) -> None:
        try:
            facts = self._path(name).stat()
            told = (facts.st_mode, facts.st_size, int(facts.st_mtime))
        except OSError:
            told = (0, 0, 0)
        self.stream.write(struct.pack("<4s3I", b"STAT", *told))

    def _receive(self, argument: str) -> None:
        name, _, mode = argument.rpartition(",")
        pieces, reason = [], "couldn't write: No space left on device" if self.fault == "nospace" else ""
        while True:
            kind, length = struct.unpack("<4sI", self.stream.read(8))
            if kind == b"DONE":
                break
            pieces.append(self.stream.read(length))
        if not reason:
            try:
                self._path(name).write_bytes(b"".join(pieces))
                self._path(name).chmod(int(mode) & 0o777)
            except OSError as error:
                reason = f"couldn't create file: {error.strerror}"
        answer = reason.encode()
        self.stream.write(struct.pack("<4sI", b"FAIL" if answer else b"OKAY", len(answer)) + answer)

    def _give(self, name: str) -> None:
        data = self._path(name).read_bytes()
        for start in range(0, len(data), 1 << 16):
            piece = data[start : start + (1 << 16)]
            self.stream.write(struct.pack("<4sI", b"DATA", len(piece)) + piece)
        self.stream.write(struct.pack("<4sI", b"DONE", 0))


def listen(root: Path, port: int, fault: str, limit: int) -> None:
    server = socket.create_server(("127.0.0.1", port))
    while True:
        peer, _ = server.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=Connection(peer, root, fault, limit).serve, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--device", action="append", required=True)
    options = parser.parse_args()
    threads = []
    for words in options.device:
        port, fault, limit = (words.split(":") + ["", "0"])[:3]
        threads.append(
            threading.Thread(target=listen, args=(options.root, int(port), fault, int(limit or 0)))
        )
        threads[-1].start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
