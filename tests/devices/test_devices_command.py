"""`edgecomp devices` on inventories of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgecomp.cli import devices
from edgecomp.errors import DeviceError, InputError


def invoke(*words: str | Path) -> Any:
    return CliRunner().invoke(devices.command, [str(word) for word in words])


def test_add_list_remove(tmp_path: Path) -> None:
    book = ("--inventory", tmp_path / "d.toml")
    added = invoke("add", "pi", "--ssh", "pi@10.0.0.7", "--key", "k", "--set", "emulated=true", *book)
    assert added.exit_code == 0 and "next: edgecomp devices check pi" in added.stdout
    rows = json.loads(invoke("list", *book, "--json", "-").stdout)["devices"]
    assert rows[1] == {"name": "pi", "kind": "ssh", "address": "pi@10.0.0.7", "key": "k", "emulated": True}
    assert "address=pi@10.0.0.7" in invoke("list", *book).stdout
    assert invoke("remove", "pi", *book).exit_code == 0
    assert [r["name"] for r in json.loads(invoke("list", *book, "--json", "-").stdout)["devices"]] == [
        "local"
    ]


def test_exactly_one_way_to_reach_a_device(tmp_path: Path) -> None:
    for words in ((), ("--ssh", "a", "--adb", "b")):
        result = invoke("add", "x", *words, "--inventory", tmp_path / "d.toml")
        assert isinstance(result.exception, InputError) and "give one of --ssh" in str(result.exception)


def test_this_machine_is_checked(tmp_path: Path) -> None:
    result = invoke("check", "local", "--inventory", tmp_path / "d.toml", "--json", "-")
    row = json.loads(result.stdout)["devices"][0]
    assert row["error"] is None and row["facts"]["cores"] >= 1
    assert "local" in invoke("check", "local", "--inventory", tmp_path / "d.toml").stdout


def test_one_device_that_fails_does_not_hide_the_others(tmp_path: Path) -> None:
    book = ("--inventory", tmp_path / "d.toml")
    invoke("add", "off", "--ssh", "root@127.0.0.1:1", *book)
    result = invoke("check", *book, "--json", "-")
    rows = {row["name"]: row for row in json.loads(result.stdout)["devices"]}
    assert rows["local"]["facts"] and "no SSH connection" in rows["off"]["error"]
    assert isinstance(result.exception, DeviceError)


@pytest.mark.parametrize(
    ("pair", "value"),
    [("a=b", "b"), ("a=true", True), ("a=7", 7), ("serial=7", "7"), ("a=x=y", "x=y"), ("a=", "")],
)
def test_settings(pair: str, value: object) -> None:
    assert devices.setting(pair)[1] == value


def test_a_setting_without_a_value(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="KEY=VALUE"):
        devices.setting("a")
