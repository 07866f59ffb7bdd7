"""A first recipe for a model: what its layers, its size and the data at hand allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn

from edgecomp import models
from edgecomp import pipeline_export as exporting
from edgecomp.compress.macs import count_macs, count_parameters
from edgecomp.compress.prune import prunable
from edgecomp.errors import MissingError, ModelError
from edgecomp.pipeline_single import Model, Sources, read_preprocessing
from edgecomp.spec import Candidate, Data, Preprocessing

_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d")
_ATTENTION = ("attention", "attn")
_SMALL = 20_000
TARGETS = ("tflite-int8", "onnx-qdq", "coreml-pal4")


@dataclass(frozen=True)
class Look:
    """What was seen of a model."""

    kind: str
    parameters: int
    macs: int | None
    prunable: int
    kept: tuple[str, ...]


def look(candidate: Candidate) -> Look:
    """Kind (convolutional, transformer, recurrent, dense), size, and what channel pruning can take."""
    module = candidate.module
    zeros = tuple(torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in candidate.inputs)
    try:
        analysis = prunable(module, zeros)
        groups, kept = len(analysis.groups), tuple(f"{n}: {why}" for n, why in analysis.kept.items())
    except ModelError as error:
        groups, kept = 0, (str(error),)
    try:
        macs: int | None = count_macs(module, zeros)
    except RuntimeError:
        macs = None
    return Look(kind_of(module), count_parameters(module)[0], macs, groups, kept)


def kind_of(module: nn.Module) -> str:
    """By the layers that hold most parameters."""
    names = [type(m).__name__ for m in module.modules()]
    if any(word in name.lower() for name in names for word in _ATTENTION):
        return "transformer"
    weight: Counter[str] = Counter()
    for layer in module.modules():
        own = sum(p.numel() for p in layer.parameters(recurse=False))
        name = type(layer).__name__
        if isinstance(layer, nn.RNNBase):
            weight["recurrent"] += own
        elif any(name.startswith(c) or c in name for c in _CONVOLUTIONS):
            weight["convolutional"] += own
        elif own:
            weight["dense"] += own
    return weight.most_common(1)[0][0] if weight else "dense"


def recipe_for(model: Model, sources: Sources) -> str:
    """The text of a recipe with comments. Raises a branch of EdgecompError when the model does not run."""
    data = sources.open()
    candidate, _ = model.load(data)
    seen = look(candidate)
    source = data.evaluation or data.calibration or data.train
    labelled = source is not None and next(iter(source.batches(1))).targets is not None
    lines = [
        *_head(model, seen),
        *_data(sources),
        *_steps(seen, sources, labelled),
        *_exports(seen, labelled, {target: refusal(target, candidate, data) for target in TARGETS}),
    ]
    return "\n".join(lines) + "\n"


def _head(model: Model, seen: Look) -> list[str]:
    size = f"{seen.parameters:,} parameters"
    if seen.macs:
        size += f", {seen.macs:,} multiply-accumulates"
    lines = [
        "# Written by `edgecomp init`; run it with `edgecomp run`. What the keys mean: docs/recipes.md",
        f"# The model is {seen.kind}: {size}.",
        f"name: {_word(_name(model.spec))}",
        f"model: {_word(models.resolved(model.spec))}",
    ]
    return [*lines, f"weights: {_word(str(model.weights.resolve()))}"] if model.weights else lines


def _name(spec: str) -> str:
    place = spec.rpartition(":")[0] or spec
    return Path(place).stem if place.endswith((".py", ".pt2", ".pt")) else place


def _data(sources: Sources) -> list[str]:
    lines = ["data:"]
    roles = {"train": sources.train, "calibration": sources.calibration, "evaluation": sources.evaluation}
    for role, spec in roles.items():
        if spec is None:
            what = "TRAIN" if role == "train" else role.upper()
            lines.append(f"  # {role}: {what}   # a folder, .npz, CSV, or file.py:callable")
        elif sources.preprocessing is None:
            lines.append(f"  {role}: {_word(spec)}")
        else:
            how = _plain(read_preprocessing(sources.preprocessing))
            lines += [f"  {role}:", f"    source: {_word(spec)}", f"    preprocessing: {how}"]
    return [*lines, "seed: 0"]


def _word(text: str) -> str:
    """A string as YAML writes it, quoted where it must be."""
    return yaml.safe_dump(text, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def _plain(how: Preprocessing) -> str:
    facts = {k: list(v) if isinstance(v, tuple) else v for k, v in how.to_json().items() if v is not None}
    return yaml.safe_dump(facts, default_flow_style=True, sort_keys=False, width=10_000).strip()


def refusal(target: str, candidate: Candidate, data: Data) -> str:
    """Why a target is left out; empty when it can be exported."""
    try:
        asked = exporting.wanted(target, exporting.make_exporter(target, {}), candidate)
        if not asked.quantized:
            return ""
        if data.calibration is None and data.train is None:
            return "needs calibration data, a hundred samples or more"
        exporting.check_quantized(asked, exporting.rough_quantized(candidate, data))
    except (MissingError, ModelError) as error:
        return " ".join(str(error).split())
    return ""


def _steps(seen: Look, sources: Sources, labelled: bool) -> list[str]:
    if not (sources.calibration or sources.train):
        return [
            "steps: []   # with calibration data: quantize; with training data: prune and distill before it"
        ]
    lines = ["steps:"]
    gate = '    gates: ["drop <= 0.02"]   # points of the metric that may be lost; then stop'
    if sources.train and labelled and seen.prunable and seen.parameters > _SMALL:
        lines += [
            f"  # {seen.prunable} groups of channels can be pruned"
            + (f"; not: {seen.kept[0]}" if seen.kept else ""),
            "  - prune: {macs: 0.6, criterion: taylor}   # keep 60 % of the multiply-accumulates",
            "  - distill: {epochs: 10, learning_rate: 0.001}   # the float model is the teacher",
            gate,
        ]
    elif not sources.train:
        lines.append("  # With training data, pruning and distillation go here.")
    lines.append("  - quantize: {samples: 256}")
    return [*lines, gate] if labelled else lines


def _exports(seen: Look, labelled: bool, refused: Mapping[str, str]) -> list[str]:
    hints = {}
    if seen.kind == "transformer":
        hints["tflite-int8"] = "   # if its accuracy falls: exclude layers from quantize"
    taken = [f"  - {t}{hints.get(t, '')}" for t, why in refused.items() if not why]
    left = [f"  # - {t}   # {why}" for t, why in refused.items() if why]
    gate = "metric.delta >= -0.03" if labelled else "sqnr_db > 10"
    return [
        *("exports:" if taken else "exports: []", *taken, *left),
        f'gates: ["{gate}"]   # of every artifact, against the float model',
        "profile: {devices: [local]}",
    ]
