"""Opening an SSH connection with paramiko: host keys, keys, agent, jump host, ~/.ssh/config, a heartbeat."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko

from edgecomp.devices.faults import AuthenticationError, HostKeyError, UnreachableError
from edgecomp.errors import InputError

PASSPHRASE = "EDGECOMP_SSH_PASSPHRASE"
CONNECT_S = 15.0
BEAT_S = 5.0
FROZEN_S = 20.0


@dataclass(frozen=True)
class Login:
    """Where and as whom to log in; what is not given comes from ~/.ssh/config, then from the defaults.

    `accept`: the fingerprint `SHA256:...` of a host key that may be accepted for the first time.
    """

    host: str
    user: str | None = None
    port: int | None = None
    key: str | None = None
    jump: str | None = None
    config: str | None = None
    known_hosts: str | None = None
    accept: str | None = None

    @classmethod
    def parse(cls, address: str) -> Login:
        """`user@host:port`, with user and port optional; an IPv6 address stands in brackets."""
        user, _, rest = address.rpartition("@")
        if rest.startswith("["):
            host, _, tail = rest[1:].partition("]")
            port = tail.removeprefix(":")
        else:
            host, _, port = rest.partition(":")
        if not host or (port and not port.isdigit()):
            raise InputError(f"SSH address {address!r} does not read user@host:port, such as pi@10.0.0.7")
        return cls(host, user or None, int(port) if port else None)


def fingerprint(key: paramiko.PKey) -> str:
    """`SHA256:...` as ssh-keygen -l prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")


class _Check(paramiko.MissingHostKeyPolicy):
    """Accepts exactly the fingerprint that the user named, and remembers that key."""

    def __init__(self, login: Login) -> None:
        self.login = login

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        found = fingerprint(key)
        if self.login.accept != found:
            wanted = f"; you asked for {self.login.accept}" if self.login.accept else ""
            raise HostKeyError(
                f"the host key of {hostname} is unknown: {key.get_name()} {found}{wanted}; compare it with "
                "`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on the device, then accept it with "
                f"`edgecomp devices add ... --accept-host-key {found}`"
            )
        remember(Path(str(self.login.known_hosts)), hostname, key)


def remember(known_hosts: Path, hostname: str, key: paramiko.PKey) -> None:
    known_hosts.parent.mkdir(parents=True, exist_ok=True)
    with known_hosts.open("a") as stream:
        stream.write(f"{hostname} {key.get_name()} {key.get_base64()}\n")


def _resolved(login: Login) -> dict[str, Any]:
    """The login with what ~/.ssh/config says about the host."""
    path = Path(login.config) if login.config else Path.home() / ".ssh" / "config"
    config = paramiko.SSHConfig.from_path(str(path)) if path.exists() else paramiko.SSHConfig()
    facts = config.lookup(login.host)
    keys = [login.key] if login.key else facts.get("identityfile", [])
    for name in keys if login.key else []:
        if not Path(str(name)).expanduser().exists():
            raise InputError(f"no SSH key at {name}; check the path, or leave it out to use the agent")
    return {
        "host": facts.get("hostname", login.host),
        "user": login.user or facts.get("user"),
        "port": login.port or int(facts.get("port", 22)),
        "keys": [str(Path(str(name)).expanduser()) for name in keys],
        "jump": login.jump or facts.get("proxyjump"),
        "agent": facts.get("identitiesonly", "no") != "yes" and login.key is None,
    }


class Connection:
    """A logged-in client (with its jump host), closed by a heartbeat when the peer freezes."""

    def __init__(self, login: Login) -> None:
        self.login = login
        facts = _resolved(login)
        self.where = f"{facts['host']}:{facts['port']}"
        self._jump = Connection(_jump_login(login, facts["jump"])) if facts["jump"] else None
        self.client = paramiko.SSHClient()
        if login.known_hosts and Path(login.known_hosts).exists():
            self.client.load_host_keys(login.known_hosts)
        self.client.load_system_host_keys()
        self.client.set_missing_host_key_policy(_Check(login))
        try:
            self._connect(facts)
        except BaseException:
            self.close()
            raise
        self.answered = time.monotonic()
        threading.Thread(target=self._beat, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _connect(self, facts: dict[str, Any]) -> None:
        try:
            self.client.connect(
                facts["host"],
                facts["port"],
                username=facts["user"],
                key_filename=facts["keys"] or None,
                passphrase=os.environ.get(PASSPHRASE),
                allow_agent=facts["agent"],
                look_for_keys=not facts["keys"],
                timeout=CONNECT_S,
                banner_timeout=CONNECT_S,
                auth_timeout=CONNECT_S,
                sock=self._through_jump(facts),
            )
        except paramiko.BadHostKeyException as error:
            raise HostKeyError(
                f"the host key of {self.where} was changed: {fingerprint(error.key)} now, "
                f"{fingerprint(error.expected_key)} before; nothing was sent. If the device was installed "
                f"anew, remove its old key (`ssh-keygen -R`; {self.login.known_hosts}) and add it again"
            ) from error
        except paramiko.PasswordRequiredException as error:
            raise AuthenticationError(
                f"the SSH key for {self.where} is encrypted; load it with ssh-add, or put its passphrase "
                f"in the environment variable {PASSPHRASE}"
            ) from error
        except paramiko.AuthenticationException as error:
            raise AuthenticationError(
                f"{self.where} refused the login as {facts['user'] or os.environ.get('USER')!r}; add your "
                "public key there with ssh-copy-id, or name the key with --key"
            ) from error
        except (OSError, paramiko.SSHException, EOFError) as error:
            raise UnreachableError(
                f"no SSH connection to {self.where} ({error or type(error).__name__}); check that the "
                "device is on, its address and port, and that sshd runs"
            ) from error

    def _through_jump(self, facts: dict[str, Any]) -> Any:
        if self._jump is None:
            return None
        transport = self._jump.client.get_transport()
        if transport is None:
            raise UnreachableError(f"the jump host {self._jump.where} closed the connection")
        target = (facts["host"], facts["port"])
        return transport.open_channel("direct-tcpip", target, ("127.0.0.1", 0), timeout=CONNECT_S)

    def _beat(self) -> None:
        """Ask for an answer again and again; sshd answers even while a command is silent."""
        transport = self.client.get_transport()
        while transport is not None and transport.is_active():
            try:
                transport.global_request("keepalive@openssh.com", wait=True)
            except (paramiko.SSHException, OSError, EOFError):
                return
            self.answered = time.monotonic()
            time.sleep(BEAT_S)

    def _watch(self) -> None:
        transport = self.client.get_transport()
        while transport is not None and transport.is_active():
            if time.monotonic() - self.answered > FROZEN_S:
                transport.close()
            time.sleep(BEAT_S / 5)

    @property
    def alive(self) -> bool:
        transport = self.client.get_transport()
        return transport is not None and transport.is_active()

    def close(self) -> None:
        """Close this connection and the jump host's; one that is gone already is closed."""
        with contextlib.suppress(*resets()):
            self.client.close()
        if self._jump is not None:
            self._jump.close()


def _jump_login(login: Login, jump: str) -> Login:
    inner = Login.parse(jump)
    return Login(
        inner.host,
        inner.user,
        inner.port,
        key=login.key,
        config=login.config,
        known_hosts=login.known_hosts,
        accept=login.accept,
    )


def resets() -> tuple[type[BaseException], ...]:
    """What paramiko and the system raise when a connection is lost in the middle of work."""
    return (EOFError, paramiko.SSHException, ConnectionError, socket.timeout, OSError)
