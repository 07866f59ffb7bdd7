"""`edgecomp diagnose`: search for the preprocessing fault behind outputs that disagree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgecomp import manifest, registry
from edgecomp.cli.common import data_option, json_option, model_argument, show
from edgecomp.errors import DataError
from edgecomp.parity.diagnose import SAMPLES, Case, contract_differences, diagnose
from edgecomp.parity.observe import run
from edgecomp.spec import Artifact


def render(shown: Mapping[str, Any]) -> RenderableType:
    lines = [Text(f"{shown['samples']} samples, outputs agree to {shown['baseline_db']:.1f} dB")]
    lines += [Text(f"preprocessing differs: {line}") for line in shown["contract"]]
    table = Table("cause", "SQNR dB", "top-1 agreement", "the deployed side", box=None, pad_edge=False)
    for row in shown["causes"][:5]:
        agreement = "" if row["top1_agreement"] is None else f"{row['top1_agreement']:.2f}"
        table.add_row(row["name"], f"{row['sqnr_db']:.1f}", agreement, row["says"])
    parts: list[RenderableType] = [*lines]
    if shown["causes"]:
        parts.append(table)
    return Group(*parts, Text(shown["verdict"], style="bold"))


def read_observed(path: Path, count: int) -> tuple[np.ndarray, ...]:
    """Outputs `output_0`, ... or `outputs` from an .npz, or the array of an .npy; the first `count` rows."""
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            arrays: tuple[np.ndarray, ...] = (found,)
        else:
            names = [f"output_{i}" for i in range(len(found.files)) if f"output_{i}" in found.files]
            arrays = tuple(found[n] for n in names or [n for n in found.files if n == "outputs"])
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"observed outputs {path} cannot be read ({error}); give an .npz or .npy") from error
    if not arrays or any(len(a) < count for a in arrays):
        raise DataError(
            f"{path} must hold `outputs` (or output_0, ...) with a row for each of {count} samples of --data"
        )
    return tuple(a[:count].astype(np.float32) for a in arrays)


@click.command("diagnose")
@model_argument
@click.argument("artifact", metavar="ARTIFACT", type=click.Path(path_type=Path))
@data_option("--data", "Samples; prepared as the float model takes them.", required=True)
@click.option(
    "--observed",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Outputs of the deployed ARTIFACT for the samples of --data, in order (.npz or .npy).",
)
@click.option(
    "--preprocessing",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="What the float model takes, as YAML or JSON; default: what the artifact's manifest says.",
)
@click.option("--weights", metavar="FILE", type=click.Path(path_type=Path), help="State dict of MODEL.")
@click.option("--samples", default=SAMPLES, show_default=True, type=click.IntRange(min=1))
@json_option
def command(
    model: str,
    artifact: Path,
    data: str,
    observed: Path | None,
    preprocessing: Path | None,
    weights: Path | None,
    samples: int,
    json_path: str | None,
) -> None:
    """Say which of the usual causes makes outputs disagree.

    With --observed: what an app or a board got from ARTIFACT, against ARTIFACT run here on the right inputs.
    Without: ARTIFACT, fed as its manifest says, against the float MODEL fed as --preprocessing says.
    """
    from edgecomp.loading import open_data
    from edgecomp.models import load_model
    from edgecomp.pipeline_single import read_preprocessing
    from edgecomp.reference import TorchReference

    told: Artifact | None = manifest.read(artifact) if manifest.path_of(artifact).exists() else None
    how = (read_preprocessing(preprocessing) if preprocessing else None) or (
        told.preprocessing if told else None
    )
    source = open_data(data, how)
    how = how or source.preprocessing
    batch = next(iter(source.batches(min(samples, len(source)))))
    session = registry.load("runtimes", registry.format_of(artifact.suffix))().open(artifact)
    here = lambda inputs: run(session, inputs)  # noqa: E731
    if observed is not None:
        right, seen = here, read_observed(observed, len(batch))
    else:
        right = TorchReference(load_model(model, weights))
        fed = open_data(data, told.preprocessing) if told and told.preprocessing else source
        seen = tuple(here(next(iter(fed.batches(len(batch)))).inputs))
    case = Case(
        right,
        batch.inputs,
        tuple(np.asarray(o) for o in right(batch.inputs)),
        seen,
        how,
        (lambda p: open_data(data, p)) if Path(data).is_dir() else None,
        session.inputs,
        exact=observed is not None,
    )
    report = diagnose(case)
    contract = contract_differences(told.preprocessing if told else None, how)
    show({"samples": len(batch), "contract": contract, **report}, json_path, render)
