"""`edgecomp rebuild --check DIR`: the same recipe again, and the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgecomp.cli.common import json_option, show
from edgecomp.errors import GateFailed


def render(shown: Mapping[str, Any]) -> RenderableType:
    table = Table("artifact", "earlier", "rebuilt", "", box=None, pad_edge=False)
    for row in shown["artifacts"]:
        verdict = Text("same", style="green") if row["same"] else Text("DIFFERENT", style="bold red")
        table.add_row(row["name"], row["earlier"][:16], (row["rebuilt"] or "not built")[:16], verdict)
    lines = [Text(f"changed since: {line}") for line in shown["environment"]]
    return Group(table, *lines)


@click.command("rebuild")
@click.option("--check", "folder", metavar="DIR", required=True, type=click.Path(path_type=Path),
              help="Folder of a finished run, with its ledger.json.")  # fmt: skip
@json_option
def command(folder: Path, json_path: str | None) -> None:
    """Run the recipe of DIR again, in a temporary folder, and compare every artifact byte for byte.

    Start it where the first run was started, so that paths in the recipe hold. The exit code is 1 when an
    artifact differs.
    """
    from edgecomp.rebuild import check

    result = check(folder)
    show(result, json_path, render)
    if not result["passed"]:
        names = [a["name"] for a in result["artifacts"] if not a["same"]]
        since = f"; changed since: {', '.join(result['environment'])}" if result["environment"] else ""
        raise GateFailed(f"{', '.join(names)} of {folder} did not come out the same{since}")
