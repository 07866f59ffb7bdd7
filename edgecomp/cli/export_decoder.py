"""`edgecomp export-decoder`: a causal language model to artifacts that generate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgecomp.cli.common import data_option, json_option, model_argument, out_option, show


@click.command("export-decoder")
@model_argument
@click.option("--target", "targets", multiple=True, required=True, metavar="T", help="A target; repeatable.")
@click.option(
    "--tokenizer", metavar="FILE", type=click.Path(path_type=Path),
    help="tokenizer.json, or the model's folder; not needed where MODEL is that folder.",
)  # fmt: skip
@out_option("Folder of the artifacts.")
@click.option("--room", default=1024, show_default=True, help="Tokens that the cache holds.")
@click.option("--chunk", default=64, show_default=True, help="Tokens of a prefill where shapes are fixed.")
@click.option(
    "--cache", "storage", type=click.Choice(["float32", "int8", "int4"]), default="float32",
    show_default=True, help="How keys and values are kept.",
)  # fmt: skip
@click.option(
    "--activations", type=click.Choice(["int8", "float"]), default="int8", show_default=True,
    help="Of 4-bit weights: rounded as they run (fast), or float.",
)  # fmt: skip
@data_option("--calib", "Rows of token ids: the scales of an int8 or int4 cache.")
@json_option
def command(
    model: str,
    targets: tuple[str, ...],
    tokenizer: Path | None,
    out: Path,
    room: int,
    chunk: int,
    storage: str,
    activations: str,
    calib: str | None,
    json_path: str | None,
) -> None:
    """Export MODEL (or a checkpoint of `quantize --groups`) as a decoder with a key-value cache.

    The tokenizer and its chat template travel along. Each artifact is run half at once and half token by
    token against the teacher-forced decoder. `edgecomp generate` then writes text with it.
    """
    from edgecomp import decoding

    wishes = [
        decoding.Wish(t, room, storage, min(chunk, room), activations)  # type: ignore[arg-type]
        for t in targets
    ]
    show({"artifacts": decoding.export(model, wishes, tokenizer, out, calib)}, json_path, render)


def render(result: Mapping[str, Any]) -> RenderableType:
    table = Table(
        "artifact", "bytes", "tokens checked", "top-1 agreement", "SQNR dB", box=None, pad_edge=False
    )
    notes = []
    for made in result["artifacts"]:
        check, name = made["check"], Path(made["path"]).name
        table.add_row(
            name,
            f"{made['size_bytes']:,}",
            str(check["tokens"]),
            f"{check['top1_agreement']:.3f}",
            f"{check['sqnr_db']:.1f}",
        )
        notes += [f"{name}: {p['op']} of {p['module']}: {p['reason']}" for p in made["manifest"]["skipped"]]
    return Group(table, *[Text(note) for note in notes[:20]])
