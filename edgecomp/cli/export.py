"""`edgecomp export`: one model to one or more targets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from edgecomp.cli.common import data_option, json_option, model_argument, out_option, parse_settings, show
from edgecomp.cli.run import artifacts_table
from edgecomp.cli.step import shape
from edgecomp.errors import GateFailed, InputError


@click.command("export")
@model_argument
@click.option("--target", "targets", multiple=True, required=True, metavar="T", help="A target; repeatable.")
@data_option("--calib", "Calibration data, for targets with integer activations.")
@data_option("--data", "Evaluation data for parity; calibration data is used without it.")
@out_option("Folder of the artifacts.")
@click.option("--weights", metavar="FILE", type=click.Path(path_type=Path), help="State dict of MODEL.")
@click.option(
    "--preprocessing", metavar="FILE", type=click.Path(path_type=Path),
    help="YAML of how pictures become arrays.",
)  # fmt: skip
@click.option(
    "--input-shape", "shapes", multiple=True, metavar="N,N,...",
    help="Shape of an input, batch 1 first, where no data tells; repeatable.",
)  # fmt: skip
@click.option(
    "--safe-x86", is_flag=True,
    help="No 8-bit sum of onnx-qdq saturates on an x86 without VNNI (in a recipe, safe_x86: true).",
)  # fmt: skip
@click.option(
    "--size-budget", metavar="SIZE",
    help="Bytes of the coreml-pal4 package (3.2MB): weights get 4, 6 or 8 bits (in a recipe, size: 3.2MB).",
)  # fmt: skip
@click.option("--no-parity", is_flag=True, help="Do not compare the artifacts with the float model.")
@click.option("--gate", "gates", multiple=True, metavar="EXPR", help="A condition on every artifact.")
@click.option(
    "--set", "settings", multiple=True, metavar="[TARGET.]KEY=VALUE",
    help="A setting of quantize, or of a target's exporter (coreml-pal4.group_size=8); repeatable.",
)  # fmt: skip
@json_option
def command(
    model: str,
    targets: tuple[str, ...],
    calib: str | None,
    data: str | None,
    out: Path,
    weights: Path | None,
    preprocessing: Path | None,
    shapes: tuple[str, ...],
    safe_x86: bool,
    size_budget: str | None,
    no_parity: bool,
    gates: tuple[str, ...],
    settings: tuple[str, ...],
    json_path: str | None,
) -> None:
    """Export MODEL (or a checkpoint of edgecomp) to each target, and compare it with the float model.

    Quantized once with --calib for all targets that need it. The exit code is 1 when a gate fails.
    """
    from edgecomp.parity.gates import check_names
    from edgecomp.pipeline_single import Model, Sources, export_model

    check_names(gates)
    pairs = [*settings, *(["onnx-qdq.safe_x86=true"] if safe_x86 else [])]
    pairs += [f"coreml-pal4.size={size_budget}"] if size_budget else []
    quantize, exporters = _settings(tuple(pairs), targets)
    result = export_model(
        Model(model, weights, tuple(shape(s) for s in shapes)),
        targets,
        Sources(None, calib, data, preprocessing),
        out,
        quantize=quantize,
        exporter_settings=exporters,
        gates=gates,
        check_parity=not no_parity,
    )
    show(result, json_path, render)
    if result["passed"] is False:
        failed = [g for a in result["artifacts"] for g in a["parity"]["gates"] if not g["passed"]]
        raise GateFailed(f"{len(failed)} gates failed; the first: {failed[0]['reason']}")


def _settings(pairs: tuple[str, ...], targets: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`KEY=VALUE` is quantize's, `TARGET.KEY=VALUE` that target's exporter's."""
    exporters: dict[str, dict[str, Any]] = {}
    own = []
    for pair in pairs:
        target, dot, rest = pair.partition("=")[0].partition(".")
        if not dot:
            own.append(pair)
            continue
        if target not in targets:
            raise InputError(f"setting {pair!r} is of target {target!r}, which is not exported; add --target")
        exporters.setdefault(target, {}).update(parse_settings([pair.partition(".")[2]]))
    return parse_settings(own), exporters


def render(result: Mapping[str, Any]) -> RenderableType:
    rows = [{**a, "path": Path(a["path"]).name, "profiles": []} for a in result["artifacts"]]
    lines = [
        f"{Path(a['path']).name}: {n}"
        for a in result["artifacts"]
        for n in (a["parity"] or {}).get("notes", [])
    ]
    return Group(artifacts_table(rows), *[Text(line) for line in lines])
