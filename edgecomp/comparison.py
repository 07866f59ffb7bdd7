"""Artifacts against the float model they were made from: all that `edgecomp parity` does, in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecomp import files, manifest, progress
from edgecomp.adversarial import FastGradientSign
from edgecomp.errors import InputError
from edgecomp.ladder import climb
from edgecomp.loading import open_data
from edgecomp.on_device import SAMPLES, across
from edgecomp.parity import compare, corrupted, document, gates, metric_named
from edgecomp.parity.flips import save_inputs
from edgecomp.parity.metric import Metric
from edgecomp.pipeline_export import open_devices
from edgecomp.pipeline_single import Model
from edgecomp.reference import TorchReference
from edgecomp.spec import Artifact, Candidate, Data, DataSource


@dataclass(frozen=True)
class Comparison:
    """What to compare and how; the fields are the options of `edgecomp parity` (docs/parity.md).

    `devices`: rungs of the ladder with `ladder`, else processors whose outputs are compared with this one's.
    """

    model: str
    artifacts: tuple[Path, ...]
    data: str
    weights: Path | None = None
    gates: tuple[str, ...] = ()
    metric: str | None = None
    slices: tuple[str, ...] = ()
    corruptions: tuple[str, ...] = ()
    fgsm: float | None = None
    flips: Path | None = None
    ladder: bool = False
    devices: tuple[str, ...] = ()
    inventory: Path | None = None
    limit: int | None = None
    threads: int = 1


def run(wanted: Comparison) -> dict[str, Any]:
    """The parity JSON. Raises InputError and its branches before long work, DeviceError when one is lost."""
    gates.check_names(wanted.gates)
    if wanted.flips is not None:
        files.check_writable(wanted.flips)
    metric = metric_named.by_name(wanted.metric) if wanted.metric else None
    told = first_manifest(wanted.artifacts)
    with opened(wanted.devices, wanted.inventory) as devices:
        source = open_data(wanted.data, told.preprocessing if told else None, told.labels if told else None)
        names = corruption_names(wanted.corruptions, source)
        candidate, _ = Model(wanted.model, wanted.weights).load(Data(evaluation=source))
        entries = []
        for artifact in wanted.artifacts:
            entry = one(wanted, candidate, artifact, source, metric, names, devices)
            if wanted.ladder:
                entry["ladder"] = climb(
                    candidate, artifact, source, metric=metric, limit=wanted.limit, devices=devices
                )
            if wanted.flips is not None:
                entry["flips"]["examples"] = save_inputs(entry["flips"]["examples"], source, wanted.flips)
            entries.append(entry)
    return document(wanted.model, entries)


def one(
    wanted: Comparison,
    candidate: Candidate,
    artifact: Path,
    source: DataSource,
    metric: Metric | None,
    corruptions: Sequence[str],
    devices: Sequence[Any],
) -> dict[str, Any]:
    """The parity entry of one artifact."""
    module = candidate.original
    changed = {"fgsm": FastGradientSign(source, module, wanted.fgsm)} if wanted.fgsm is not None else None
    more = (
        {} if wanted.ladder or not devices else {"devices": on_processors(devices, artifact, source, wanted)}
    )
    return compare(
        TorchReference(module),
        artifact,
        source,
        metric=metric,
        gates=wanted.gates,
        slices=("class", *wanted.slices),
        corruptions=corruptions,
        changed=changed,
        threads=wanted.threads,
        limit=wanted.limit,
        more=more,
    )


def on_processors(
    devices: Sequence[Any], artifact: Path, source: DataSource, wanted: Comparison
) -> dict[str, Any] | None:
    """The artifact here and on each device; None for a format that runs on Apple's systems only."""
    if artifact.suffix == ".mlpackage":
        progress.note(f"{artifact.name} runs on Apple's systems only: not compared between processors")
        return None
    progress.note(f"running {artifact.name} on {', '.join(d.name for d in devices)}")
    return across(devices, artifact, source, samples=min(SAMPLES, wanted.limit or SAMPLES))


def corruption_names(wanted: Sequence[str], source: DataSource) -> list[str]:
    """Names of corruptions that apply to the data; `all` stands for every one. Raises UnknownNameError."""
    names = corrupted.names_for(source) if "all" in wanted else list(wanted)
    for name in names:
        corrupted.check(source, name)
    return names


def first_manifest(artifacts: Sequence[Path]) -> Artifact | None:
    """The manifest of the first artifact that has one: its preprocessing and labels open the data."""
    found = [manifest.read(a) for a in artifacts if a.exists() and manifest.path_of(a).exists()]
    return found[0] if found else None


@contextmanager
def opened(names: Sequence[str], inventory: Path | None) -> Iterator[list[Any]]:
    """Devices by name, closed in the end. Raises UnknownNameError."""
    if len(set(names)) < len(names):
        raise InputError(f"--device names one device twice: {', '.join(names)}")
    with ExitStack() as stack:
        devices = open_devices(names, inventory)
        for device in devices:
            stack.callback(device.close)
        yield devices
