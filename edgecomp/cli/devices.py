"""`edgecomp devices`: the inventory, what a device has and lacks, and runtimes for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Group
from rich.table import Table
from rich.text import Text

from edgecomp import progress, registry
from edgecomp.cli.common import json_option, show
from edgecomp.cli.parity_show import processors
from edgecomp.errors import DeviceError, EdgecompError, InputError

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def inventory_option(function: F) -> F:
    return click.option(
        "--inventory", type=PATH, metavar="FILE", help="The inventory file (default: the user's)."
    )(function)


def read(path: Path | None) -> Any:
    return registry.load("profiling", "inventory").read(path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """List, add, check, set up or remove devices.

    The inventory is a TOML file in the user's configuration folder. `local` is this machine and always
    there.
    """


@command.command("list")
@inventory_option
@json_option
def list_devices(inventory: Path | None, json_path: str | None) -> None:
    """Show the devices of the inventory; nothing is connected."""
    book = read(inventory)
    rows = [{"name": name, **book.settings(name)} for name in book.names()]
    show({"inventory": str(book.path), "devices": rows}, json_path, list_table)


def list_table(facts: dict[str, Any]) -> Table:
    table = Table(title=facts["inventory"])
    for name in ("name", "kind", "settings"):
        table.add_column(name)
    for row in facts["devices"]:
        rest = " ".join(f"{k}={v}" for k, v in row.items() if k not in ("name", "kind"))
        table.add_row(row["name"], row["kind"], rest)
    return table


@command.command("add")
@click.argument("name")
@click.option("--ssh", metavar="USER@HOST[:PORT]", help="A board over SSH.")
@click.option("--jetson", metavar="USER@HOST[:PORT]", help="A Jetson over SSH, with trtexec.")
@click.option("--apple", metavar="USER@HOST[:PORT]", help="A Mac over SSH, for itself or its iPhone.")
@click.option("--adb", metavar="SERIAL", help="An Android device, by the serial that `adb devices` shows.")
@click.option("--qemu", metavar="ROOT", help="An arm64 root under qemu-aarch64, to count instructions.")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="A setting of the kind; repeatable.")
@click.option("--key", help="The SSH key file (default: agent, then ~/.ssh).")
@click.option("--jump", metavar="USER@HOST[:PORT]", help="The SSH host to go through.")
@click.option("--workdir", help="The folder for files on the device.")
@click.option("--python", help="How Python is started on the device.")
@click.option("--accept-host-key", metavar="SHA256:...", help="Accept this host key now, for the first time.")
@inventory_option
def add(
    name: str,
    ssh: str | None,
    jetson: str | None,
    apple: str | None,
    adb: str | None,
    qemu: str | None,
    pairs: tuple[str, ...],
    key: str | None,
    jump: str | None,
    workdir: str | None,
    python: str | None,
    accept_host_key: str | None,
    inventory: Path | None,
) -> None:
    """Add a device, or replace the one of that name. Nothing is connected, unless a host key is accepted."""
    addresses = {"ssh": ssh, "jetson": jetson, "apple": apple}
    chosen = {kind: ("address", value) for kind, value in addresses.items() if value}
    chosen |= {"adb": ("serial", adb)} if adb else {}
    chosen |= {"qemu": ("root", qemu)} if qemu else {}
    if len(chosen) != 1:
        raise InputError("give one of --ssh, --jetson, --apple, --adb, --qemu: how the device is reached")
    kind, (main, value) = next(iter(chosen.items()))
    given = {"key": key, "jump": jump, "workdir": workdir, "python": python}
    settings = {main: value} | {k: v for k, v in given.items() if v} | dict(map(setting, pairs))
    book = read(inventory)
    if accept_host_key:
        accept(book, name, kind, settings, accept_host_key)
    book.add(name, kind, settings)
    click.echo(f"{name} ({kind}) is in {book.path}; next: edgecomp devices check {name}")


def setting(pair: str) -> tuple[str, str | int | bool]:
    """`KEY=VALUE`; true, false and whole numbers are what they say. Raises InputError."""
    key, equals, text = pair.partition("=")
    if not equals or not key:
        raise InputError(f"setting {pair!r} does not read KEY=VALUE")
    words: dict[str, bool] = {"true": True, "false": False}
    return key, words[text] if text in words else int(text) if text.isdigit() and key != "serial" else text


def accept(book: Any, name: str, kind: str, settings: dict[str, Any], fingerprint: str) -> None:
    if "address" not in settings:
        raise InputError(f"--accept-host-key is for devices over SSH; {name!r} is of kind {kind}")
    facts = settings | {"known_hosts": str(book.known_hosts), "accept": fingerprint}
    device = registry.load("devices", kind).from_settings(name, facts)
    try:
        device.connect()
    finally:
        device.close()


@command.command("remove")
@click.argument("name")
@inventory_option
def remove(name: str, inventory: Path | None) -> None:
    """Take a device out of the inventory; nothing on the device is changed."""
    book = read(inventory)
    book.remove(name)
    click.echo(f"{name} is no longer in {book.path}")


@command.command("check")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@inventory_option
@json_option
def check(names: tuple[str, ...], inventory: Path | None, json_path: str | None) -> None:
    """Log in to devices (default: all) and show what they have, what they lack and how to get it."""
    book = read(inventory)
    opened = [book.open(name) for name in names or book.names()]
    with ThreadPoolExecutor(len(opened)) as pool:
        rows = list(pool.map(checked, opened))
    show({"devices": rows}, json_path, check_table)
    failed = [row for row in rows if row["error"]]
    if failed:
        raise DeviceError("; ".join(f"{row['name']}: {row['error']}" for row in failed))


def checked(device: Any) -> dict[str, Any]:
    progress.note(f"{device.name}: asking")
    row = {"name": device.name, "kind": device.kind, "error": None, "facts": None, "lacking": []}
    try:
        facts = device.probe()
        lacking = registry.load("profiling", "lacking")(device.name, facts)
        return row | {"facts": facts, "lacking": lacking}
    except EdgecompError as error:
        return row | {"error": str(error)}
    finally:
        device.close()


FACTS = ("kind", "model", "SoC", "cores", "ISA", "OS", "RAM GB", "governor", "°C", "runtimes")


def check_table(facts: dict[str, Any]) -> Group:
    """A column for each device, so that it fits a terminal."""
    table = Table(title="Devices")
    table.add_column("")
    notes, columns = [], []
    for row in facts["devices"]:
        table.add_column(row["name"], overflow="fold")
        known = row["facts"] is not None
        columns.append([row["kind"], *(described(row["facts"]) if known else ["failed", *["-"] * 8])])
        notes += [f"{row['name']} lacks {gap['what']}: {gap['get']}" for gap in row["lacking"]]
    for index, name in enumerate(FACTS):
        table.add_row(name, *[column[index] for column in columns])
    return Group(table, *[Text(note) for note in notes])


def described(f: dict[str, Any]) -> list[str]:
    runtimes = [f"Python {f['python']}"] if f["python"] else []
    runtimes += [f"{name} {version}" for name, version in f["runtimes"].items()]
    temperature = max((value for _, value in f["temperatures"]), default=None)
    cells = [
        f["model"],
        f["soc"],
        f["cores"],
        "+".join([f["isa"] or "-", *f["isa_features"]]) + (" (emulated)" if f["emulated"] else ""),
        f["os"],
        f"{f['ram_bytes'] / 1e9:.1f}" if f["ram_bytes"] else None,
        f["governor"],
        f"{temperature:.0f}" if temperature is not None else None,
        ", ".join(runtimes) or None,
    ]
    return ["-" if cell is None else str(cell) for cell in cells]


@command.command("agree")
@click.argument("artifact", type=PATH)
@click.option("--inputs", type=PATH, required=True, help="An .npz with one array [N, ...] for each input.")
@click.option("--device", "names", multiple=True, required=True, metavar="NAME", help="A device; repeatable.")
@inventory_option
@json_option
def agree(
    artifact: Path, inputs: Path, names: tuple[str, ...], inventory: Path | None, json_path: str | None
) -> None:
    """Run one artifact on several processors and compare their outputs, step by step.

    The first device is what the others are compared with. A device whose integer kernels saturate is named.
    """
    book = read(inventory)
    opened = [book.open(name) for name in names]
    try:
        found = registry.load("profiling", "agreement")(opened, artifact, inputs)
    finally:
        for device in opened:
            device.close()
    show(found, json_path, processors)


@command.command("setup")
@click.argument("name")
@click.option("--runtime", "kinds", multiple=True, help="tflite, onnx; repeatable (default: both).")
@click.option("--wheels", type=PATH, help="A folder of wheels for the device (no network then).")
@inventory_option
@json_option
def setup(
    name: str, kinds: tuple[str, ...], wheels: Path | None, inventory: Path | None, json_path: str | None
) -> None:
    """Install runtimes on a device, into a folder of their own, with wheels that this machine fetches."""
    device = read(inventory).open(name)
    progress.note(f"{name}: fetching and sending wheels")
    try:
        install = registry.load("profiling", "setup")
        versions = install(device, kinds=kinds or ("tflite", "onnx"), wheels=wheels)
    finally:
        device.close()
    lines = [f"{package} {version}" for package, version in versions.items()]
    show({"device": name, "runtimes": versions}, json_path, lambda _: Text(f"{name}: {', '.join(lines)}"))
