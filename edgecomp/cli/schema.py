"""`edgecomp schema`: the recipe's JSON Schema, for editors."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgecomp import files


@click.command("schema")
@click.option(
    "--out", metavar="FILE", type=click.Path(path_type=Path), help="Write it there (default: stdout)."
)
def command(out: Path | None) -> None:
    """Print the JSON Schema of recipes, with the settings of every step and target installed here.

    Editors check and complete with it: put `# yaml-language-server: $schema=recipe.schema.json` at the top of
    a recipe.
    """
    from edgecomp.recipe import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if out is None:
        click.echo(text, nl=False)
        return
    with files.atomic(out) as temporary:
        temporary.write_text(text)
    click.echo(f"wrote {out}", err=True)
