"""`edgecomp parity`: artifacts against the float model; a gate that fails makes the exit code 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgecomp import files, manifest
from edgecomp.cli.common import data_option, json_option, model_argument, show
from edgecomp.errors import GateFailed, InputError
from edgecomp.parity import corrupted, document, gates, metric_named
from edgecomp.parity.flips import save_inputs
from edgecomp.parity.junit import write
from edgecomp.spec import Data


def render(shown: Mapping[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [Text(f"reference {shown['reference']}"), figures_table(shown["artifacts"])]
    for entry in shown["artifacts"]:
        parts += [Text(f"{Path(entry['path']).name}: {note}") for note in entry["notes"]]
        parts += [Text(line) for line in detail_lines(entry)]
        if "ladder" in entry:
            parts += ladder_parts(entry["ladder"])
        parts += [gate_line(entry["path"], gate) for gate in entry["gates"]]
    return Group(*parts)


def detail_lines(entry: Mapping[str, Any]) -> list[str]:
    """Worst slice, gaps, worst corruption and flips, one line each where there is something to say."""
    lines = []
    slice_ = entry["worst_slice"]
    if slice_ is not None:
        low, high = slice_["ci95"]
        lines.append(
            f"worst slice: {slice_['column']} {slice_['value']!r}, {slice_['samples']} samples: "
            f"{slice_['reference']:.4f} -> {slice_['artifact']:.4f}, {slice_['delta']:+.4f} "
            f"[{low:+.4f}, {high:+.4f}]"
        )
    for column, gap in entry["gaps"].items():
        if gap is not None:
            lines.append(
                f"gap between best and worst {column}: {gap['reference']:.4f} -> {gap['artifact']:.4f} "
                f"({gap['change']:+.4f})"
            )
    for row in entry["corruptions"]:
        lines.append(
            f"{row['name']} {row['severity']}: agreement {number(row['top1_agreement'], '.4f')}, "
            f"{row['metric'] or 'no metric'} {number(row['reference'], '.4f')} -> "
            f"{number(row['artifact'], '.4f')}, loss beyond the float model's "
            f"{number(row['excess_loss'], '+.4f')}"
        )
    for flip in entry["flips"]["examples"][:5]:
        lines.append(
            f"flip: sample {flip['index']} is {flip['target']!r}, the artifact says {flip['artifact']!r} "
            f"({flip['artifact_confidence']:.2f}){' ' + flip['input'] if flip['input'] else ''}"
        )
    return lines


def figures_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        "artifact", "samples", "top-1 agreement", "SQNR dB", "cosine", "max error", "metric", "float",
        "artifact", "delta [95 %]", "flips -/+", "bytes", box=None, pad_edge=False,
    )  # fmt: skip
    for entry in entries:
        table.add_row(Path(entry["path"]).name, *figures_cells(entry), f"{entry['size_bytes']:,}")
        if entry["optimized"]:
            cells = figures_cells({**entry["optimized"], "samples": entry["samples"]})
            table.add_row("  optimized session", *cells, "")
    return table


def figures_cells(entry: Mapping[str, Any]) -> list[str]:
    metric, flips = entry["metric"], entry["flips"]
    cells = [
        str(entry["samples"]),
        number(entry["top1_agreement"], ".4f"),
        number(entry["sqnr_db"], ".2f"),
        number(entry["cosine"], ".5f"),
        number(entry["max_abs_error"], ".4g"),
    ]
    if metric is None:
        cells += ["no targets", "", "", ""]
    else:
        low, high = metric["ci95"]
        interval = f"{metric['delta']:+.4f} [{low:+.4f}, {high:+.4f}]"
        cells += [metric["name"], f"{metric['reference']:.4f}", f"{metric['artifact']:.4f}", interval]
    return [*cells, "" if flips["negative"] is None else f"{flips['negative']}/{flips['positive']}"]


def ladder_parts(ladder: Mapping[str, Any]) -> list[RenderableType]:
    """The rungs, the layers that lose most, and the verdict."""
    rungs = Table("rung", "metric", "top-1 agreement", "SQNR dB", "flips -/+", "", box=None, pad_edge=False)
    for rung in ladder["rungs"]:
        cells = figures_cells(rung)
        metric = "" if rung["metric"] is None else f"{rung['metric']['artifact']:.4f}"
        verdict = Text("ok", style="green") if rung["passed"] else Text("FAULT", style="bold red")
        rungs.add_row(rung["name"], metric, cells[1], cells[2], cells[-1], verdict)
    layers = Table(
        "layer", "op", "weights dB", "activations dB", "on own inputs dB", box=None, pad_edge=False
    )
    seen = [row for row in ladder["layers"] if row["activation_db"] is not None or row["complaint"]]
    for row in sorted(seen, key=lambda r: r["activation_db"] or 0.0)[:8]:
        figures = [number(row[key], ".1f") for key in ("weight_db", "activation_db", "local_db")]
        layers.add_row(row["module"] or row["node"], row["op"], *figures)
    blamed = ladder["blamed"]
    sentence = (
        "no stage stands out" if blamed is None else f"{blamed['rung']} ({blamed['step']}): {blamed['why']}"
    )
    return [Text(), rungs, Text(), layers, Text(sentence, style="bold")]


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def gate_line(path: str, gate: Mapping[str, Any]) -> Text:
    if gate["passed"]:
        return Text(f"passed  {Path(path).name}: {gate['expr']} ({gate['value']:.6g})", style="green")
    return Text(f"FAILED  {Path(path).name}: {gate['expr']}: {gate['reason']}", style="bold red")


def fail_if_needed(entries: Sequence[Mapping[str, Any]]) -> None:
    """Raise GateFailed that counts what failed; the lines were printed before."""
    failed = [(e, g) for e in entries for g in e["gates"] if not g["passed"]]
    if failed:
        entry, gate = failed[0]
        raise GateFailed(
            f"{len(failed)} of {sum(len(e['gates']) for e in entries)} gates failed; the first: "
            f"{Path(entry['path']).name}: {gate['reason']}"
        )


def first_manifest(artifacts: Sequence[Path]) -> Any:
    """The manifest of the first artifact that has one: its preprocessing and labels open the data."""
    found = [manifest.read(a) for a in artifacts if a.exists() and manifest.path_of(a).exists()]
    return found[0] if found else None


@click.command("parity")
@model_argument
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@data_option("--data", "Evaluation data, prepared as the artifact says.", required=True)
@click.option("--weights", metavar="FILE", type=click.Path(path_type=Path), help="State dict of MODEL.")
@click.option("--gate", "exprs", metavar="EXPR", multiple=True, help="A condition; repeatable.")
@click.option("--metric", metavar="NAME", help="accuracy, rmse, miou, ...; default: what fits the data.")
@click.option("--slice", "columns", metavar="COLUMN", multiple=True, help="Metadata column; repeatable.")
@click.option("--corruption", "corruptions", metavar="NAME|all", multiple=True, help="Repeatable.")
@click.option("--fgsm", metavar="EPSILON", type=float, help="Adversarial inputs made on the float model.")
@click.option("--flips", metavar="DIR", type=click.Path(path_type=Path), help="Write inputs of flips here.")
@click.option("--ladder", is_flag=True, help="Every stage apart; names the first layer that diverges.")
@click.option("--device", "devices", metavar="NAME", multiple=True, help="A rung of --ladder; repeatable.")
@click.option("--junit", metavar="FILE", type=click.Path(path_type=Path), help="Write gates as JUnit XML.")
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Use the first N samples only.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1))
@json_option
def command(
    model: str,
    artifacts: tuple[Path, ...],
    data: str,
    weights: Path | None,
    exprs: tuple[str, ...],
    metric: str | None,
    columns: tuple[str, ...],
    corruptions: tuple[str, ...],
    fgsm: float | None,
    flips: Path | None,
    ladder: bool,
    devices: tuple[str, ...],
    junit: Path | None,
    limit: int | None,
    threads: int,
    json_path: str | None,
) -> None:
    """Compare artifacts with the float model they were made from.

    ARTIFACT is a .tflite or .onnx file or an .mlpackage folder. A gate is NAME OP NUMBER, such as
    'top1_agreement >= 0.98', 'sqnr_db > 20', 'metric.delta.low >= -0.01', 'size_bytes < 2MB'. The exit
    code is 1 when a gate fails.
    """
    from edgecomp.adversarial import FastGradientSign
    from edgecomp.ladder import climb
    from edgecomp.loading import open_data
    from edgecomp.parity import compare
    from edgecomp.pipeline_export import open_devices
    from edgecomp.pipeline_single import Model
    from edgecomp.reference import TorchReference

    gates.check_names(exprs)
    if devices and not ladder:
        raise InputError(f"--device {devices[0]} is a rung of the ladder; add --ladder")
    for path in (flips, junit.parent if junit else None):
        if path is not None:
            files.check_writable(path)
    task = metric_named.by_name(metric) if metric else None
    told = first_manifest(artifacts)
    source = open_data(data, told.preprocessing if told else None, told.labels if told else None)
    candidate, _ = Model(model, weights).load(Data(evaluation=source))
    module = candidate.original
    changed = {"fgsm": FastGradientSign(source, module, fgsm)} if fgsm is not None else None
    names = corrupted.names_for(source) if "all" in corruptions else corruptions
    for name in names:
        corrupted.check(source, name)
    reference = TorchReference(module)
    entries = [
        compare(
            reference,
            artifact,
            source,
            metric=task,
            gates=exprs,
            slices=("class", *columns),
            corruptions=names,
            changed=changed,
            threads=threads,
            limit=limit,
        )
        for artifact in artifacts
    ]
    if ladder:
        opened = open_devices(devices)
        for entry, artifact in zip(entries, artifacts, strict=True):
            entry["ladder"] = climb(candidate, artifact, source, metric=task, limit=limit, devices=opened)
    if flips is not None:
        for entry in entries:
            entry["flips"]["examples"] = save_inputs(entry["flips"]["examples"], source, flips)
    if junit is not None:
        write(entries, junit)
    show(document(model, entries), json_path, render)
    fail_if_needed(entries)
