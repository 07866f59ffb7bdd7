"""`edgecomp profile`: measure artifacts on devices, or say which of two is faster."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from rich.console import Group
from rich.table import Table
from rich.text import Text

from edgecomp import progress, registry
from edgecomp.cli.common import json_option, show
from edgecomp.errors import DeviceError, EdgecompError, InputError

PATH = click.Path(path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, type=PATH)
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME",
    help="A device of the inventory; repeatable; or all.",
)
@click.option("--inventory", type=PATH, help="The inventory file (default: the user's).")
@click.option("--compare", nargs=2, type=PATH, metavar="A B", help="Interleave two and say which is faster.")
@click.option("--threads", default=1, show_default=True, help="Threads of the runtime.")
@click.option("--runs", default=50, show_default=True, help="Timed runs, at least.")
@click.option("--seconds", default=1.0, show_default=True, help="Seconds of timed runs, at least.")
@click.option("--warmup", default=5.0, show_default=True, help="Seconds of warm-up, at most.")
@click.option("--pin", metavar="CORES", help="Cores that may be used, such as 2,3.")
@click.option("--inputs", type=PATH, help="An .npz with the inputs; else a golden sample, else random.")
@click.option("--runtime", default="auto", show_default=True, help="Runtime by its module name.")
@click.option(
    "--accelerator", default="auto", show_default=True, help="ONNX provider, delegate library, none."
)
@click.option("--sustain", metavar="TIME", help="Keep running that long (90s, 30m) and show the curve.")
@click.option("--instructions", is_flag=True, help="Count instructions of one inference (emulated Arm).")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds that one artifact may take.")
@json_option
def command(
    artifacts: tuple[Path, ...],
    devices: tuple[str, ...],
    inventory: Path | None,
    compare: tuple[Path, Path] | None,
    threads: int,
    runs: int,
    seconds: float,
    warmup: float,
    pin: str | None,
    inputs: Path | None,
    runtime: str,
    accelerator: str,
    sustain: str | None,
    instructions: bool,
    timeout: float,
    json_path: str | None,
) -> None:
    """Measure latency, memory and per-op time of each ARTIFACT in a fresh process on each device.

    Warm-up until times are stable, then at least --runs runs and --seconds seconds. The median has a 95 %
    bootstrap interval; percentiles interpolate linearly; a figure that was not measured is `-` (null). The
    JSON is one profile; with several artifacts or devices it is {"profiles": [...], "failures": [...]}.
    """
    if bool(artifacts) == bool(compare):
        raise InputError("give artifacts to profile, or --compare A B: one of the two")
    how = registry.load("profiling", "settings")(
        threads=threads, runs=runs, seconds=seconds, warmup_seconds=warmup,
        runtime=runtime, accelerator=accelerator, pin=cores(pin), timeout_s=timeout,
    )  # fmt: skip
    opened = open_devices(devices, inventory)
    try:
        if compare:
            facts = each(opened, lambda device: [compared(device, compare, how)])
            whole = {"comparisons": facts[0], "failures": facts[1]}
            show(facts[0][0] if len(opened) == 1 else whole, json_path, lambda _: comparison_table(facts[0]))
        else:
            more = {"inputs": inputs, "sustain_s": span(sustain), "instructions": instructions}
            facts = each(opened, lambda device: profiled(device, artifacts, how, more))
            registry.load("profiling", "flag-slow-int8")(facts[0])
            one = len(artifacts) == len(opened) == 1
            whole = {"profiles": facts[0], "failures": facts[1]}
            show(facts[0][0] if one else whole, json_path, lambda _: profile_table(facts[0]))
    finally:
        for device in opened:
            device.close()
    if facts[1]:
        raise DeviceError("; ".join(f"{f['device']}: {f['error']}" for f in facts[1]))


def cores(text: str | None) -> tuple[int, ...]:
    """`2,3` -> (2, 3). Raises InputError."""
    try:
        return tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"--pin {text!r} does not read as core numbers, such as 0 or 2,3") from None


def span(text: str | None) -> float:
    """`90s`, `30m`, `1h` or a number of seconds -> seconds. Raises InputError."""
    if not text:
        return 0.0
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1])
    try:
        return float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        raise InputError(f"--sustain {text!r} is no time; expected such as 90s, 30m or 1h") from None


def open_devices(names: tuple[str, ...], inventory: Path | None) -> list[Any]:
    """Devices by name from the inventory; this machine when no name is given."""
    if not names or names == ("local",):
        return [registry.load("devices", "local")()]
    book = registry.load("profiling", "inventory").read(inventory)
    wanted = sorted(book.devices) or ["local"] if names == ("all",) else list(dict.fromkeys(names))
    return [book.open(name) for name in wanted]


def each(devices: list[Any], work: Any) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Run `work(device)` on all devices at a time; a device that fails does not end the others.

    With a single device its error is raised as it is.
    """
    if len(devices) == 1:
        return work(devices[0]), []
    results: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    with ThreadPoolExecutor(len(devices)) as pool:
        futures = [(device, pool.submit(work, device)) for device in devices]
        try:
            for device, future in futures:
                try:
                    results += future.result()
                except EdgecompError as error:
                    kind = type(error).__name__
                    failures.append({"device": device.name, "kind": kind, "error": str(error)})
        except BaseException:
            for device in devices:  # Ctrl-C: what runs there is ended before the threads are waited for
                device.close()
            raise
    return results, failures


def profiled(
    device: Any, artifacts: tuple[Path, ...], how: Any, more: dict[str, Any]
) -> list[dict[str, Any]]:
    profile = registry.load("profiling", "profile")
    found = []
    for artifact in artifacts:
        progress.note(f"{device.name}: {artifact}")
        found.append(profile(device, artifact, how, **more))
    return found


def compared(device: Any, pair: tuple[Path, Path], how: Any) -> dict[str, Any]:
    progress.note(f"{device.name}: {pair[0]} and {pair[1]} in turns")
    result: dict[str, Any] = registry.load("profiling", "compare")(device, *pair, how)
    return result


def figure(value: float | None, digits: int = 3, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def profile_table(profiles: list[dict[str, Any]]) -> Group:
    table = Table(title="Profile (milliseconds; MB = 10^6 bytes)")
    table.add_column("artifact", overflow="fold", no_wrap=True)
    for name in ("device", "runtime"):
        table.add_column(name)
    numbers = ("init", "first", "p50", "95 % interval", "p90", "p99", "runs", "peak MB", "model MB", "noise")
    for name in numbers:
        table.add_column(name, justify="right")
    for p in profiles:
        table.add_row(*profile_row(p))
    lines = [line for p in profiles for line in (heading(p), *slowest(p))]
    return Group(table, *[Text(line) for line in lines])


def profile_row(p: dict[str, Any]) -> list[str]:
    spread = p["latency_ms"] or {}
    low, high = spread.get("ci95") or (None, None)
    runtime = p["runtime"]
    words = [runtime["name"], runtime["version"], runtime["accelerator"]]
    return [
        Path(p["artifact"]).name,
        p["device"]["name"],
        " ".join(str(word) for word in words if word) or "-",
        figure(p["init_ms"], 1),
        figure(p["first_ms"]),
        figure(spread.get("p50")),
        "-" if low is None else f"{low:,.3f} to {high:,.3f}",
        figure(spread.get("p90")),
        figure(spread.get("p99")),
        str(len(spread["samples"])) if spread.get("samples") else "-",
        figure(p["peak_rss_bytes"], 1, 1e-6),
        figure(p["model_bytes"], 3, 1e-6),
        p["noise"]["verdict"] if p["noise"] else "-",
    ]


def heading(p: dict[str, Any]) -> str:
    """Machine, instructions, energy and warnings of a profile, in one line."""
    device = p["device"]
    parts = [str(word) for word in (device["model"], device["isa"], device["os"]) if word]
    if p["instructions"] is not None:
        parts.append(f"{p['instructions']:,} instructions an inference")
    if p["energy_mj"] is not None:
        parts.append(f"{p['energy_mj']:.2f} mJ an inference")
    if p["sustained"]:
        parts.append(f"{p['sustained']['retained']:.1%} of the speed kept at the end")
    return f"{Path(p['artifact']).name} on {device['name']}: {'; '.join(parts + p['warnings'])}"


def slowest(p: dict[str, Any]) -> list[str]:
    """Where time and ops went: a line for each place, and the five slowest ops."""
    ops = p["ops"] or []
    total = sum(op["ms"] or 0.0 for op in ops)
    lines = []
    for place in sorted({op["placed_on"] for op in ops}):
        mine = [op for op in ops if op["placed_on"] == place]
        share = f", {sum(op['ms'] or 0.0 for op in mine) / total:.0%} of the time" if total else ""
        lines.append(f"  {place}: {len(mine)} of {len(ops)} ops{share}")
    timed = sorted((op for op in ops if op["ms"] is not None), key=lambda op: -op["ms"])[:5]
    return lines + [f"    {op['ms']:8.3f} ms  {op['type']}  {op['name']}" for op in timed]


def comparison_table(comparisons: list[dict[str, Any]]) -> Group:
    lines = []
    for c in comparisons:
        low, high = c["ci95"]
        names = {side: Path(c[side]["artifact"]).name for side in ("a", "b")}
        numbers = f"B / A = {c['ratio']:.4f}, 95 % interval {low:.4f} to {high:.4f}"
        medians = ", ".join(f"{names[s]} {c[s]['latency_ms']['p50']:.3f} ms" for s in ("a", "b"))
        if c["faster"] is None:
            said = f"cannot tell which is faster ({numbers})"
        else:
            said = f"{names[c['faster']]} is faster ({numbers})"
        lines.append(f"{c['device']['name']}: {said}; medians: {medians}")
        lines += [f"  {warning}" for warning in c["warnings"]]
    return Group(*[Text(line) for line in lines])
