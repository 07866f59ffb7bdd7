"""`edgecomp verify`: replay the golden inputs and outputs that travel with an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgecomp.cli.common import artifact_argument, json_option, show
from edgecomp.errors import GateFailed


def render(shown: Mapping[str, Any]) -> RenderableType:
    table = Table("output", "largest difference", "allowed", "unit", "", box=None, pad_edge=False)
    for row in shown["outputs"]:
        verdict = Text("same", style="green") if row["passed"] else Text("DIFFERENT", style="bold red")
        table.add_row(row["name"], f"{row['difference']:.4g}", f"{row['limit']:g}", row["unit"], verdict)
    head = f"{shown['artifact']} ({shown['target']}), {shown['samples']} golden samples"
    return Group(Text(head), table)


@click.command("verify")
@artifact_argument
@json_option
def command(artifact: Path, json_path: str | None) -> None:
    """Check the hash of ARTIFACT, run its golden inputs, and compare with its golden outputs.

    Quantized outputs may differ by one step, float outputs by a small share of the largest value. The exit
    code is 1 when they differ by more.
    """
    from edgecomp import golden

    result = golden.replay(artifact)
    show(result, json_path, render)
    if not result["passed"]:
        wrong = next(o for o in result["outputs"] if not o["passed"])
        raise GateFailed(
            f"{artifact}: output {wrong['name']!r} differs from its golden value by "
            f"{wrong['difference']:.4g} {wrong['unit']}, {wrong['limit']:g} is allowed: "
            "the runtime here does not compute what the exporter checked"
        )
