"""`edgecomp targets`: every registered target, and whether it can be built on this machine."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from edgecomp import registry
from edgecomp.cli import needs
from edgecomp.cli.common import json_option, show

WHAT = {
    "tflite-int8": "TFLite, full integer: int8 weights, activations, inputs and outputs",
    "tflite-int16x8": "TFLite, int16 activations and int8 weights",
    "tflite-dynamic": "TFLite, int8 weights, activations quantized at run time",
    "tflite-int4": "TFLite, 4-bit group-wise weights",
    "tflite-fp16": "TFLite, float16 weights",
    "tflite-fp32": "TFLite, float32",
    "onnx-qdq": "ONNX, static int8 as QuantizeLinear / DequantizeLinear pairs",
    "onnx-dynamic": "ONNX, int8 weights, activations quantized at run time",
    "onnx-int4": "ONNX, 4-bit block-wise weights",
    "onnx-fp32": "ONNX, float32",
    "coreml-pal4": "Core ML, weights as a palette of 16 values (4 bits)",
    "coreml-pal6": "Core ML, weights as a palette of 64 values (6 bits)",
    "coreml-int8": "Core ML, int8 weights",
    "coreml-int4": "Core ML, 4-bit block-wise linear weights",
    "coreml-fp16": "Core ML, float16",
    "tensorrt-int8": "ONNX QDQ that trtexec turns into an INT8 engine on the Jetson",
}


def facts() -> list[dict[str, Any]]:
    """One row for each target: name, what it is, `built_here`, what is missing and the way to get it."""
    return [_row(name) for name in registry.names("exporters")]


def _row(name: str) -> dict[str, Any]:
    entry = registry.entry("exporters", name)
    own = entry.distribution in ("", "edgecomp")
    missing = needs.missing_from(needs.required_by("edgecomp" if own else entry.distribution, entry.extra))
    install = f"pip install 'edgecomp[{entry.extra}]'" if entry.extra else f"pip install {' '.join(missing)}"
    return {
        "name": name,
        "what": WHAT.get(name, f"from the package {entry.distribution}"),
        "from": entry.distribution or "edgecomp",
        "built_here": not missing,
        "missing": missing,
        "install": install if missing else None,
    }


def render(rows: list[dict[str, Any]]) -> Table:
    table = Table("target", "built here", "what it is", "what is missing", box=None, pad_edge=False)
    for row in rows:
        lack = f"{', '.join(row['missing'])}: {row['install']}" if row["missing"] else ""
        table.add_row(row["name"], "yes" if row["built_here"] else "no", row["what"], lack)
    return table


@click.command("targets")
@json_option
def command(json_path: str | None) -> None:
    """List the targets, what each is, and whether it can be built on this machine."""
    show(facts(), json_path, render)
