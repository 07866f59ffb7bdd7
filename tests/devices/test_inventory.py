"""The inventory file: what is written is what is read, and what is wrong in it is named."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgecomp.devices.inventory import Inventory, to_toml
from edgecomp.devices.local import LocalDevice
from edgecomp.devices.ssh import SshDevice
from edgecomp.errors import InputError, UnknownNameError

VALUES = st.one_of(st.text(max_size=20), st.integers(-(2**31), 2**31), st.booleans())
ENTRIES = st.dictionaries(st.sampled_from(["address", "key", "port_number"]), VALUES)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(min_size=1, max_size=10), ENTRIES, max_size=3))
def test_what_is_written_is_what_a_toml_reader_reads(devices: dict[str, dict[str, str | int | bool]]) -> None:
    assert tomllib.loads(to_toml(devices)).get("devices", {}) == devices


def test_a_device_is_added_read_opened_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "devices.toml"
    Inventory.read(path).add("pi4", "ssh", {"address": "pi@10.0.0.7:2222", "python": "python3.9"})
    book = Inventory.read(path)
    assert book.names() == ["local", "pi4"]
    device = book.open("pi4")
    assert isinstance(device, SshDevice)
    assert (device.login.user, device.login.host, device.login.port) == ("pi", "10.0.0.7", 2222)
    assert device.login.known_hosts == str(tmp_path / "new" / "known_hosts")
    assert device.python()[-1] == "python3.9"
    book.remove("pi4")
    assert Inventory.read(path).names() == ["local"]


def test_this_machine_is_always_there(tmp_path: Path) -> None:
    assert isinstance(Inventory.read(tmp_path / "none").open("local"), LocalDevice)
    with pytest.raises(InputError, match="no entry"):
        Inventory.read(tmp_path / "none").remove("local")


def test_the_nearest_name_is_offered(tmp_path: Path) -> None:
    book = Inventory(tmp_path / "f", {"raspberry": {"kind": "ssh", "address": "a"}})
    with pytest.raises(UnknownNameError, match="did you mean 'raspberry'"):
        book.open("rasberry")


@pytest.mark.parametrize("name", ["local", "all", "", "a b", "-x"])
def test_names_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        Inventory(tmp_path / "f").add(name, "ssh", {"address": "a"})


def test_unknown_kinds_keys_and_types(tmp_path: Path) -> None:
    book = Inventory(tmp_path / "f")
    with pytest.raises(UnknownNameError, match="unknown device kind 'shh'; did you mean 'ssh'"):
        book.add("x", "shh", {})
    with pytest.raises(UnknownNameError, match="did you mean 'address'"):
        book.add("x", "ssh", {"adress": "a"})
    with pytest.raises(InputError, match="emulated of device 'x' is 'yes'; expected bool"):
        book.add("x", "ssh", {"address": "a", "emulated": "yes"})
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("text", ["[devices", "devices = 3", "[devices]\nx = 1"])
def test_files_that_are_no_inventory(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.toml").write_text(text)
    with pytest.raises(InputError, match="inventory"):
        Inventory.read(tmp_path / "f.toml")


def test_an_entry_without_a_kind(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text('[devices.x]\naddress = "a"')
    with pytest.raises(UnknownNameError, match="none for device x"):
        Inventory.read(tmp_path / "f.toml")


@pytest.mark.parametrize("address", ["", "pi@", "pi@host:ssh"])
def test_addresses_that_are_none(tmp_path: Path, address: str) -> None:
    book = Inventory(tmp_path / "f", {"x": {"kind": "ssh", "address": address}})
    with pytest.raises(InputError, match="user@host:port"):
        book.open("x")


def test_an_ipv6_address(tmp_path: Path) -> None:
    device = Inventory(tmp_path / "f", {"x": {"kind": "ssh", "address": "[fe80::1]:22"}}).open("x")
    assert isinstance(device, SshDevice) and (device.login.host, device.login.port) == ("fe80::1", 22)
