"""The user's devices: a TOML file in the user's configuration folder, or any other that is named.

    [devices.pi4]
    kind = "ssh"
    address = "pi@10.0.0.7"

Each kind's class says which settings it takes (`SETTINGS`) and is made by `from_settings`.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

from edgecomp import files, registry
from edgecomp.devices.transport import Transport
from edgecomp.errors import InputError, UnknownNameError

Settings = Mapping[str, str | int | bool]

LOCAL = "local"


def default_path() -> Path:
    return Path(platformdirs.user_config_dir("edgecomp")) / "devices.toml"


@dataclass
class Inventory:
    """Devices by name. `local`, this machine, is always there and needs no entry."""

    path: Path
    devices: dict[str, dict[str, str | int | bool]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None = None) -> Inventory:
        """Read the file; one that is not there is empty. Raises InputError."""
        chosen = path or default_path()
        if not chosen.exists():
            return cls(chosen)
        try:
            facts = tomllib.loads(chosen.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"inventory {chosen} is not valid TOML: {error}; mend or remove it") from error
        devices = facts.get("devices", {})
        if not isinstance(devices, dict) or not all(isinstance(d, dict) for d in devices.values()):
            raise InputError(f"inventory {chosen} needs tables [devices.NAME], each with a kind")
        for name, settings in devices.items():
            registry.entry("devices", str(settings.get("kind", f"none for device {name}")))
        return cls(chosen, devices)

    def names(self) -> list[str]:
        return sorted({LOCAL, *self.devices})

    def settings(self, name: str) -> dict[str, str | int | bool]:
        """Raises UnknownNameError with the nearest name."""
        if name == LOCAL:
            return {"kind": "local"}
        if name not in self.devices:
            raise UnknownNameError("device", name, self.names())
        return self.devices[name]

    def open(self, name: str) -> Transport:
        """The device itself; nothing is connected yet. Raises UnknownNameError, InputError, MissingError."""
        settings = dict(self.settings(name))
        kind = str(settings.pop("kind"))
        checked(name, kind, settings)
        if kind != "local":
            settings.setdefault("known_hosts", str(self.known_hosts))
        device: Transport = registry.load("devices", kind).from_settings(name, settings)
        return device

    @property
    def known_hosts(self) -> Path:
        """Host keys that were accepted with `devices add --accept-host-key`."""
        return self.path.with_name("known_hosts")

    def add(self, name: str, kind: str, settings: Settings) -> None:
        """Add or replace a device and write the file. Raises InputError for an unusable name or value."""
        if name == LOCAL or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name == "all":
            raise InputError(
                f"device name {name!r} cannot be used; expected letters, digits, - _ . and not local or all"
            )
        checked(name, kind, settings)
        self.devices[name] = {"kind": kind, **settings}
        self.write()

    def remove(self, name: str) -> None:
        if name == LOCAL:
            raise InputError("device 'local' is this machine and has no entry that could be removed")
        self.settings(name)
        del self.devices[name]
        self.write()

    def write(self) -> None:
        with files.atomic(self.path) as temporary:
            temporary.write_text(to_toml(self.devices))


def checked(name: str, kind: str, settings: Settings) -> None:
    """Raises UnknownNameError for a kind or key that nobody knows, InputError for a value of another type."""
    allowed = registry.load("devices", kind).SETTINGS
    for key, value in settings.items():
        if key in ("kind", "known_hosts"):
            continue
        if key not in allowed:
            raise UnknownNameError(f"setting of device {name!r} ({kind})", key, allowed)
        if type(value) is not allowed[key]:
            raise InputError(f"{key} of device {name!r} is {value!r}; expected {allowed[key].__name__}")


def to_toml(devices: Mapping[str, Settings]) -> str:
    """Tables of strings, integers and booleans as TOML; JSON's spelling of these three is TOML's too."""
    blocks = []
    for name, settings in sorted(devices.items()):
        lines = [f"{key} = {_spelt(value)}" for key, value in settings.items()]
        blocks.append("\n".join([f"[devices.{_spelt(name)}]", *lines]) + "\n")
    return "\n".join(blocks)


def _spelt(value: str | int | bool) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
