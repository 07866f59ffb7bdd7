"""`edgecomp search`: which settings of a recipe are worth their bytes and milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgecomp.cli.common import json_option, out_option, show
from edgecomp.cli.threads import wait_without_spinning
from edgecomp.errors import MissingError


@click.command("search")
@click.argument("recipe", metavar="RECIPE.yaml", type=click.Path(path_type=Path))
@out_option("Folder of the study and its trials.")
@click.option("--trials", type=click.IntRange(min=1), help="Trials in all; the recipe's number without it.")
@click.option("--storage", metavar="URL", help="A database that machines share, such as postgresql://...")
@json_option
def command(recipe: Path, out: Path, trials: int | None, storage: str | None, json_path: str | None) -> None:
    """Run the recipe's `search` section: many runs with other settings, and the Pareto front of them.

    Stopped and started again, it goes on with the trials that are left.
    """
    wait_without_spinning()
    from edgecomp.recipe import read

    try:
        from edgecomp.search import search
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise MissingError(
            "edgecomp search needs optuna, which is not installed: pip install 'edgecomp[search]'"
        ) from error
    show(search(read(recipe), out, trials, storage), json_path, render)


def render(result: Mapping[str, Any]) -> RenderableType:
    table = Table("trial", *result["objectives"], "settings", "", box=None, pad_edge=False)
    for row in result["trials"]:
        values = row["values"]
        cells = [format(values[o], ",.5g") if values else "failed" for o in result["objectives"]]
        settings = ", ".join(f"{k}={short(v)}" for k, v in row["params"].items())
        mark = "Pareto" if row["number"] in result["pareto"] else ""
        table.add_row(str(row["number"]), *cells, settings, mark)
    failed = [Text(f"trial {r['number']}: {r['reason']}") for r in result["trials"] if r["reason"]]
    return Group(table, *failed)


def short(value: Any) -> str:
    return format(value, ".4g") if isinstance(value, float) else str(value)
