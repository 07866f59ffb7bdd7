"""`edgecomp inspect`: what an artifact takes, gives and holds, and what stayed float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgecomp import files, manifest, registry
from edgecomp.cli.common import data_option, json_option, show
from edgecomp.cli.inspect_forecast import render_against, render_forecast
from edgecomp.cli.step import shape
from edgecomp.errors import ArtifactError, InputError, MissingError
from edgecomp.spec import OpPlacement, Session, TensorSpec

# Targets whose every operation has integer types in the file. In a QDQ file an operation has float types and
# stands between DequantizeLinear and QuantizeLinear; the runtime makes one integer kernel of the three.
_INTEGER_TARGETS = {"tflite-int8", "tflite-int16x8"}


def facts(path: Path) -> dict[str, Any]:
    """Everything known about an artifact; `ops` is None when its runtime is not on this machine.

    Raises ArtifactError when the file is missing, damaged, or of a kind that no runtime opens.
    """
    told = _told(path)
    session, runtime, note = _open(path)
    notes = [] if manifest.path_of(path).exists() else ["no manifest beside it: made by another tool"]
    if note:
        notes.append(note)
    if told["target"] == "onnx-qdq":
        notes.append("QDQ: the runtime makes one integer kernel of a float op between two pairs")
    if session and told["inputs"] is None:
        told["inputs"] = [asdict(t) for t in session.inputs]
        told["outputs"] = [asdict(t) for t in session.outputs]
    placed = session.placement() if session else None
    kernels = _kernels(session, told["format"], notes)
    ops = None if placed is None else count(placed)
    unexplained = unexplained_floats(placed or [], told["target"], told["skipped"])
    read = getattr(session, "stored_weights", None)
    weights = [{**asdict(w), "bits": round(w.bits, 3)} for w in read()] if read else None
    return {
        **told,
        "runtime": runtime,
        "ops": ops,
        "kernels": kernels,
        "weights": weights,
        "float_without_reason": unexplained,
        "notes": notes,
    }


def _kernels(session: Any, form: str, notes: list[str]) -> list[dict[str, Any]] | None:
    """What ONNX Runtime really runs, after fusion: kernels by type, dtype and provider; None elsewhere."""
    if form != "onnx" or not hasattr(session, "realized"):
        return None
    try:
        return count([op for op in session.realized() if op.dtype])
    except ArtifactError as error:
        notes.append(str(error))
        return None


def _told(path: Path) -> dict[str, Any]:
    """The manifest's keys, or the few that a bare file shows by itself."""
    if manifest.path_of(path).exists() or not path.exists():
        return {"path": str(path), **manifest.to_json(manifest.read(path))}
    if path.suffix not in (".tflite", ".onnx", ".mlpackage"):
        raise ArtifactError(f"{path} is not an artifact; expected a .tflite, an .onnx or an .mlpackage")
    unknown = dict.fromkeys(("target", "inputs", "outputs", "preprocessing", "golden", "recipe_sha256"))
    return {
        "path": str(path),
        "format": registry.format_of(path.suffix),
        **unknown,
        "size_bytes": files.size_bytes(path),
        "sha256": files.sha256(path),
        "labels": [],
        "history": [],
        "versions": {},
        "skipped": [],
    }


def _open(path: Path) -> tuple[Session | None, dict[str, str] | None, str]:
    """A session, what runs it, and a note when the runtime is not installed."""
    try:
        runtime = registry.load("runtimes", registry.format_of(path.suffix))()
        session = runtime.open(path)
    except MissingError as error:
        return None, None, f"ops not read: {error}"
    return session, {"name": runtime.name, "version": runtime.version}, ""


def count(placed: Sequence[OpPlacement]) -> list[dict[str, Any]]:
    """Ops by type, dtype and place, the most frequent first."""
    counted = Counter((op.type, op.dtype, op.placed_on) for op in placed)
    rows = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    return [
        {"type": kind, "dtype": dtype, "placed_on": place, "count": number}
        for (kind, dtype, place), number in rows
    ]


def unexplained_floats(
    placed: Sequence[OpPlacement], target: str | None, skipped: Sequence[Mapping[str, str]]
) -> list[str]:
    """Names of float ops in an integer target that `skipped` does not account for."""
    if target not in _INTEGER_TARGETS:
        return []
    accounted = {row["op"] for row in skipped} | {row["module"] for row in skipped}
    floats = [op for op in placed if op.dtype.startswith("float")]
    return [op.name for op in floats if op.name not in accounted and op.type not in accounted]


def render(shown: dict[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [_head(shown), Text(), _tensors(shown)]
    if shown["preprocessing"]:
        parts += [Text(), Text("preprocessing: " + _preprocessing(shown["preprocessing"]))]
    if shown["labels"]:
        parts.append(Text(f"labels: {', '.join(shown['labels'][:12])}{' ...' * (len(shown['labels']) > 12)}"))
    if shown["ops"] is not None:
        parts += [Text(), _ops(shown["ops"], "ops")]
    if shown["kernels"] is not None:
        parts += [Text(), _ops(shown["kernels"], "kernels")]
    if shown["weights"]:
        parts += [Text(), _weights(shown["weights"])]
    parts += [Text(), *_left_float(shown)]
    parts += [Text(f"note: {note}") for note in shown["notes"]]
    return Group(*parts)


def _head(shown: dict[str, Any]) -> Text:
    steps = " -> ".join(row["name"] for row in shown["history"]) or "none recorded"
    made = ", ".join(f"{name} {version}" for name, version in shown["versions"].items())
    lines = [
        f"{shown['path']}",
        f"target {shown['target'] or 'not stated'}, {shown['size_bytes']:,} bytes",
        f"steps: {steps}",
    ]
    if made:
        lines.append(f"made with {made}")
    if shown["runtime"]:
        lines.append(f"opened with {shown['runtime']['name']} {shown['runtime']['version']}")
    return Text("\n".join([*lines, f"sha256 {shown['sha256']}"]))


def _tensors(shown: dict[str, Any]) -> Table:
    table = Table("", "name", "shape", "dtype", "layout", "scale", "zero point", box=None, pad_edge=False)
    for way, key in (("in", "inputs"), ("out", "outputs")):
        for tensor in shown[key] or []:
            table.add_row(way, *_tensor_cells(tensor))
    return table


def _tensor_cells(tensor: Mapping[str, Any]) -> tuple[str, ...]:
    spec = TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])})
    shape = "x".join(map(str, spec.shape)) or "scalar"
    scale = "" if spec.scale is None else f"{spec.scale:.7g}"
    zero_point = "" if spec.zero_point is None else str(spec.zero_point)
    return spec.name, shape, spec.dtype, spec.layout, scale, zero_point


def _preprocessing(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)


def _ops(rows: Sequence[Mapping[str, Any]], what: str) -> Table:
    total = sum(row["count"] for row in rows)
    table = Table(what, "type", "dtype", "placed on", box=None, pad_edge=False)
    for row in rows:
        table.add_row(str(row["count"]), row["type"], row["dtype"], row["placed_on"])
    table.add_row(str(total), "in all", "", "")
    return table


def _weights(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Bits per weight by layer as stored, scales and zero points included."""
    table = Table("weight", "elements", "dtype", "bytes", "bits per weight", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row["name"], f"{row['elements']:,}", row["dtype"], f"{row['bytes']:,}", f"{row['bits']:.2f}"
        )
    elements, size = (sum(row[key] for row in rows) for key in ("elements", "bytes"))
    table.add_row("in all", f"{elements:,}", "", f"{size:,}", f"{8 * size / elements:.2f}")
    return table


def _left_float(shown: dict[str, Any]) -> list[Text]:
    lines = [Text(f"not as asked: {r['op']} of {r['module']}: {r['reason']}") for r in shown["skipped"]]
    lines += [Text(f"float, no reason recorded: {name}") for name in shown["float_without_reason"]]
    return lines or [Text("nothing was skipped or left in float")]


@click.command("inspect")
@click.argument("subject", metavar="ARTIFACT")
@click.option("--target", metavar="T", help="Forecast what this target will make of MODEL.")
@click.option("--model", metavar="MODEL", help="Put the forecast from MODEL beside the artifact's real ops.")
@click.option("--weights", metavar="FILE", type=click.Path(path_type=Path), help="State dict of MODEL.")
@data_option("--data", "Data that tells MODEL's input shapes.")
@click.option(
    "--input-shape", "shapes", multiple=True, metavar="N,N,...",
    help="Shape of an input, batch 1 first, where no data tells; repeatable.",
)  # fmt: skip
@json_option
def command(
    subject: str,
    target: str | None,
    model: str | None,
    weights: Path | None,
    data: str | None,
    shapes: tuple[str, ...],
    json_path: str | None,
) -> None:
    """Show inputs, outputs, preprocessing, ops by dtype, bits per weight, and what stayed float and why.

    ARTIFACT is a .tflite or .onnx file or an .mlpackage folder. With --target, before any export: which ops
    of MODEL the target will run in integers, in float, or not at all, why, and from which source line.
    """
    if target is None and model is None:
        show(facts(Path(subject)), json_path, render)
        return
    from edgecomp import forecast
    from edgecomp.pipeline_single import Model

    if target is not None and model is not None:
        raise InputError("give --target with a MODEL, or --model with an ARTIFACT: one of the two")
    given = Model(model or subject, weights, tuple(shape(s) for s in shapes))
    if target is not None:
        show(forecast.of_model(given, target, data), json_path, render_forecast)
        return
    known = facts(Path(subject))
    beside = forecast.of_artifact(Path(subject), given)
    show({**known, "forecast": beside}, json_path, lambda f: Group(render(f), *render_against(beside)))
