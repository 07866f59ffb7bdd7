"""What `edgecomp parity` prints: figures, what stands out, the ladder, processors and gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def render(shown: Mapping[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [Text(f"reference {shown['reference']}"), figures_table(shown["artifacts"])]
    for entry in shown["artifacts"]:
        parts += [Text(f"{Path(entry['path']).name}: {note}") for note in entry["notes"]]
        parts += [Text(line) for line in detail_lines(entry)]
        if "ladder" in entry:
            parts += ladder_parts(entry["ladder"])
        if entry.get("devices"):
            parts += [Text(), processors(entry["devices"])]
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


def processors(facts: Mapping[str, Any]) -> Group:
    """One artifact on several processors, against the first."""
    table = Table(title=f"{facts['artifact']} on {facts['samples']} samples, against {facts['reference']}")
    for name in ("device", "ISA", "equal", "largest step", "top-1 flips", "to its reference kernels"):
        table.add_column(name, justify="left" if name in ("device", "ISA") else "right")
    for row in facts["rows"]:
        cells = [f"{row['equal_share']:.2%}", row["largest_step"], row["top1_flips"], row["reference_step"]]
        table.add_row(row["device"], row["isa"], *[str(cell) for cell in cells])
    return Group(table, *[Text(warning) for warning in facts["warnings"]])
