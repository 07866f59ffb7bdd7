"""The stage ladder: from the float model to the artifact's deploy kernels, which rung lost what, and where.

float -> batch norms folded -> compressed -> fake-quantized -> exported, reference kernels -> deploy kernels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule

from edgecomp import ladder_local, ladder_stages, manifest, registry
from edgecomp.compress.ptq import example_inputs
from edgecomp.errors import ArtifactError, EdgecompError, ModelError
from edgecomp.graph import capture
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.graph.interpret import watch
from edgecomp.ladder_local import LayerTally, NamedLayers, samples_of
from edgecomp.numerics import metrics
from edgecomp.on_device import OnDevice
from edgecomp.parity.entry import NOTABLE_DB, check_labels, figures
from edgecomp.parity.metric import Metric
from edgecomp.parity.observe import Observations, observe
from edgecomp.reference import TorchReference
from edgecomp.spec import Artifact, Batch, Candidate, DataSource

# Samples for the comparison layer by layer; the rungs' own figures use all samples.
LAYER_SAMPLES = 8
FLOAT, FOLDED, COMPRESSED, QUANTIZED = "float", "folded", "compressed", "fake-quantized"
EXPORTED, DEPLOYED = "exported", "deploy kernels"
# The original captured anew: no rung of its own, it checks the folding.
FRESH = "fresh"
STEP_OF = {
    FOLDED: "capture",
    COMPRESSED: "compression",
    QUANTIZED: "quantize",
    EXPORTED: "export",
    DEPLOYED: "runtime",
}
# An artifact whose layers cannot be seen must agree with its plan to this, end to end.
END_TO_END_DB = 15.0
# Deploy kernels this near to the float model are sound, whatever the reference kernels reach (float16 does).
SOUND_DB = 40.0
FLOAT_STEPS = {"quantize"}
# Samples sent to a device at once.
DEVICE_BATCH = 256


@dataclass(frozen=True)
class Blame:
    """Where the first fault is: rung, the step behind it, node and torch module (where known), and why."""

    rung: str
    step: str
    why: str
    node: str | None = None
    module: str | None = None
    sure: bool = True


@dataclass
class Stages:
    """What can run, by rung, and what is known about the layers."""

    candidate: Candidate
    graph: GraphModule
    models: dict[str, Any]
    batches: list[Batch]
    artifact: Artifact | None = None
    blames: list[Blame] = field(default_factory=list)
    tallies: list[LayerTally] = field(default_factory=list)


def climb(
    candidate: Candidate,
    artifact_path: Path,
    source: DataSource,
    *,
    metric: Metric | None = None,
    limit: int | None = None,
    layer_samples: int = LAYER_SAMPLES,
    devices: Sequence[Any] = (),
) -> dict[str, Any]:
    """Run every rung over the data. Returns `rungs[]`, `layers[]` and `blamed` (None when all is well).

    `candidate`: what the artifact was exported from; its `original` is the float model. `devices`: opened
    devices that run the artifact too, a rung each.
    Raises ModelError for a candidate without its float original, DataError, and ArtifactError.
    """
    if candidate.original is None:
        raise ModelError("the ladder needs the float original of the candidate; load it with its checkpoint")
    stages = prepare(candidate, source, layer_samples)
    add_artifact(stages, Path(artifact_path), source)
    stages.models |= device_rungs(stages, Path(artifact_path), devices)
    names = [n for n in stages.models if n not in (FLOAT, FRESH)]
    seen = observe(
        stages.models[FLOAT],
        {n: stages.models[n] for n in order_for(names, stages)},
        source,
        metric=metric,
        limit=limit,
        batch_size=DEVICE_BATCH if devices else 32,
    )
    rungs = [rung_facts(seen, n) for n in names]
    blames = [*check_fold(stages), *check_plan(stages), *stages.blames, *check_export(stages, seen, rungs)]
    blames += check_deploy(rungs, [d.name for d in devices])
    ranked = sorted(blames, key=lambda b: rank(b.rung, names))
    for rung in rungs:
        mine = [b for b in ranked if b.rung == rung["name"]]
        rung["passed"] = not mine
        rung["why"] = mine[0].why if mine else None
    return {
        "rungs": rungs,
        "layers": layer_table(stages),
        "blamed": vars(ranked[0]) if ranked else None,
        "all_blamed": [vars(b) for b in ranked],
    }


def prepare(candidate: Candidate, source: DataSource, layer_samples: int) -> Stages:
    """The torch rungs."""
    batches = list(islice(source.batches(layer_samples), 1))
    examples = example_inputs(candidate)
    models: dict[str, Any] = {FLOAT: TorchReference(candidate.original)}
    pruned = [r for r in candidate.history if r.kind not in FLOAT_STEPS]
    graph = candidate.module if candidate.quantization is not None else capture(candidate.module, examples)
    if pruned:
        models[FOLDED] = TorchReference(capture(candidate.original, examples))
        models[COMPRESSED] = TorchReference(graph)
    else:
        models[FOLDED] = TorchReference(graph)
        models[FRESH] = TorchReference(capture(candidate.original, examples))
    if candidate.quantization is not None:
        models[QUANTIZED] = TorchReference(fake_quantize(graph, candidate.quantization))
    return Stages(candidate, graph, models, batches)


def add_artifact(stages: Stages, path: Path, source: DataSource) -> None:
    """The artifact's rungs; an artifact that does not open is a blame, not an error."""
    if not path.exists():
        raise ArtifactError(
            f"no artifact at {path}; expected a .tflite or .onnx file or an .mlpackage folder"
        )
    runtime = registry.load("runtimes", registry.format_of(path.suffix))()
    try:
        if manifest.path_of(path).exists():
            stages.artifact = manifest.read(path)
            check_labels(stages.artifact, source)
    except EdgecompError as error:
        stages.blames.append(Blame(EXPORTED, STEP_OF[EXPORTED], str(error)))
    for name, optimize in ((EXPORTED, False), (DEPLOYED, True)):
        try:
            session = runtime.open(path, optimize=optimize)
            stages.models[name] = named(stages, session) if hasattr(session, "weighted") else session
        except ArtifactError as error:
            node, module = named_in(str(error), stages.graph)
            stages.blames.append(Blame(name, STEP_OF[name], str(error), node, module, False))


def named(stages: Stages, session: Any) -> Any:
    """A Core ML session with the graph nodes that its weighted operations come from."""
    target = stages.artifact.target if stages.artifact else "coreml-fp16"
    candidate = replace(stages.candidate, module=stages.graph)
    told = registry.load("forecasts", "coreml")(candidate, target)
    return NamedLayers(session, {row.name: row.node for row in told})


def device_rungs(stages: Stages, path: Path, devices: Sequence[Any]) -> dict[str, Any]:
    session = stages.models.get(DEPLOYED) or stages.models.get(EXPORTED)
    if session is None:
        return {}
    return {d.name: OnDevice(d, path, session) for d in devices}


def named_in(message: str, graph: GraphModule) -> tuple[str | None, str | None]:
    """The node that a runtime's message is about: the only one whose operation the message names."""
    words = set(re.findall(r"[a-z0-9]+", message.lower().replace("_", "")))
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    found = [n for n in nodes if ladder_local.op_name(n).replace("_", "") in words]
    return (found[0].name, found[0].meta.get("module")) if len(found) == 1 else (None, None)


def order_for(names: Sequence[str], stages: Stages) -> list[str]:
    """The rung that the artifact must reproduce comes first: the others are compared with it."""
    quantized = QUANTIZED in stages.models and lowers_plan(stages.artifact)
    first = QUANTIZED if quantized else COMPRESSED if COMPRESSED in stages.models else FOLDED
    return [first, *(n for n in names if n != first)]


def rung_facts(seen: Observations, name: str) -> dict[str, Any]:
    facts = figures(seen, name)
    kept = ("samples", "top1_agreement", "sqnr_db", "cosine", "max_abs_error", "metric", "flips")
    between = seen.between.get(name)
    return {
        "name": name,
        **{k: facts[k] for k in kept},
        "to_plan_db": between.sqnr_db if between else None,
        "passed": True,
        "why": None,
    }


def rank(rung: str, names: Sequence[str]) -> int:
    order = [FOLDED, COMPRESSED, QUANTIZED, EXPORTED, DEPLOYED, *names]
    return order.index(rung)


def check_fold(stages: Stages) -> list[Blame]:
    """Is the graph the float original, batch norms folded?

    A fresh capture must equal the original to float32 precision. The candidate's own graph may have biases
    mended by `quantize`; when it is far from the original and a layer's weights are not those of the fresh
    capture, that layer is blamed. Not looked at once pruning or training changed the model on purpose.
    """
    fresh = stages.models[FRESH].module if FRESH in stages.models else stages.models[FOLDED].module
    inputs = next(samples_of(stages.batches))
    whole = agreement_db(stages, stages.models[FLOAT], TorchReference(fresh), inputs)
    if whole < ladder_stages.FOLDED_DB:
        errors = ladder_stages.fold_errors(stages.candidate.original, fresh, stages.batches)
        wrong = [e for e in errors if e["sqnr_db"] < ladder_stages.FOLDED_DB]
        return [fold_blame(whole, wrong, f"float32 gives {ladder_stages.FOLDED_DB:.0f} dB and more")]
    if COMPRESSED in stages.models:
        return []
    whole = agreement_db(stages, stages.models[FLOAT], stages.models[FOLDED], inputs)
    if whole >= ladder_stages.MENDED_DB:
        return []
    wrong = ladder_stages.changed_weights(fresh, stages.graph)
    return [fold_blame(whole, wrong, "its weights are not those of the float model")] if wrong else []


def agreement_db(stages: Stages, a: Any, b: Any, inputs: tuple[np.ndarray, ...]) -> float:
    return min(metrics.sqnr_db(e, f) for e, f in zip(a(inputs), b(inputs), strict=True))


def fold_blame(whole: float, wrong: Sequence[dict[str, Any]], what: str) -> Blame:
    first: dict[str, Any] = wrong[0] if wrong else {"node": None, "module": None, "sqnr_db": whole}
    where = first["module"] or first["node"] or "unknown"
    why = (
        f"the folded graph reaches {whole:.1f} dB to the float model; {what}; first different: {where} "
        f"({first['sqnr_db']:.1f} dB)"
    )
    return Blame(FOLDED, STEP_OF[FOLDED], why, first["node"], first["module"], bool(wrong))


def check_plan(stages: Stages) -> list[Blame]:
    """Weights worse than a scale for each channel gives, and activations whose range is wrong."""
    plan = stages.candidate.quantization
    if plan is None:
        return []
    found = []
    for e in ladder_stages.weight_errors(stages.graph, plan):
        lost = e["reachable_db"] - e["sqnr_db"]
        if lost > ladder_stages.WEIGHT_SLACK_DB:
            why = (
                f"the integers of {e['module'] or e['node']} reach {e['sqnr_db']:.1f} dB to its float "
                f"weights, one scale for each channel reaches {e['reachable_db']:.1f} dB"
            )
            found.append((lost, Blame(QUANTIZED, STEP_OF[QUANTIZED], why, e["node"], e["module"])))
    for e in ladder_stages.activation_errors(stages.graph, plan, stages.batches):
        if e["sqnr_db"] < ladder_stages.ACTIVATION_DB:
            why = (
                f"the output of {e['module'] or e['node']} ({e['op']}) reaches {e['sqnr_db']:.1f} dB once "
                "rounded to its scale: its range is wrong"
            )
            lost = ladder_stages.ACTIVATION_DB - e["sqnr_db"]
            found.append((lost, Blame(QUANTIZED, STEP_OF[QUANTIZED], why, e["node"], e["module"])))
    return [blame for _, blame in sorted(found, key=lambda item: -item[0])]


def check_export(stages: Stages, seen: Observations, rungs: Sequence[dict[str, Any]]) -> list[Blame]:
    """Layers that the artifact computes otherwise than the plan says, in order of execution."""
    session = stages.models.get(EXPORTED)
    if session is None:
        return []
    plan = stages.candidate.quantization if lowers_plan(stages.artifact) else None
    if ladder_local.shows_layers(session):
        stages.tallies = ladder_local.local_errors(stages.graph, plan, session, stages.batches)
        blames = []
        for tally in stages.tallies:
            complaint = tally.complaint(tolerance_of(stages))
            if complaint is not None:
                where = tally.module or tally.node
                why = f"{where} ({tally.op}) {complaint}"
                blames.append(Blame(EXPORTED, STEP_OF[EXPORTED], why, tally.node, tally.module))
        if blames or stages.tallies:
            return blames
    between = seen.between.get(EXPORTED)
    if between is not None and between.sqnr_db < END_TO_END_DB:
        why = f"the artifact reaches {between.sqnr_db:.1f} dB to what it was exported from"
        return [Blame(EXPORTED, STEP_OF[EXPORTED], why, sure=False)]
    return []


def check_deploy(rungs: Sequence[dict[str, Any]], devices: Sequence[str]) -> list[Blame]:
    """Kernels that lose much against the reference kernels of the same file."""
    by_name = {r["name"]: r for r in rungs}
    exported = by_name.get(EXPORTED)
    found = []
    for name in (DEPLOYED, *devices):
        rung = by_name.get(name)
        if rung is None or exported is None:
            continue
        if rung["sqnr_db"] >= min(exported["sqnr_db"] - NOTABLE_DB, SOUND_DB):
            continue
        why = (
            f"these kernels reach {rung['sqnr_db']:.1f} dB to the float model, the reference kernels "
            f"{exported['sqnr_db']:.1f} dB on the same file"
        )
        found.append(Blame(name, STEP_OF[DEPLOYED], why, sure=False))
    return found


def lowers_plan(artifact: Artifact | None) -> bool:
    """Does the artifact carry the plan's scales? Core ML's targets compress weights alone, floats neither."""
    if artifact is None:
        return True
    words = set(artifact.target.split("-"))
    return artifact.format != "coreml" and not words & {"fp32", "fp16", "dynamic"}


def tolerance_of(stages: Stages) -> float:
    half = stages.artifact is not None and stages.artifact.target.endswith("fp16")
    return ladder_local.FLOAT_TOLERANCE["float16" if half else "float32"]


def layer_table(stages: Stages) -> list[dict[str, Any]]:
    """One row for each layer: weights and activations apart.

    `weight_db`: integers against float weights. `activation_db`: the artifact's value (or, where it cannot be
    seen, the fake-quantized one) against the float graph's, all layers before included. `local_db`: the
    artifact against the plan on its own inputs. `x86_saturation`: share of weight pairs that can overflow the
    16-bit sums of an x86 without VNNI.
    """
    plan = stages.candidate.quantization
    weights = {e["node"]: e for e in ladder_stages.weight_errors(stages.graph, plan)} if plan else {}
    tallies = {t.node: t for t in stages.tallies}
    total = cumulative(stages)
    rows = []
    for node in stages.graph.graph.nodes:
        if node.op != "call_function" or not (node.name in total or node.name in weights):
            continue
        tally = tallies.get(node.name)
        rows.append(
            {
                "node": node.name,
                "module": node.meta.get("module", ""),
                "op": ladder_local.op_name(node),
                "weight_db": weights[node.name]["sqnr_db"] if node.name in weights else None,
                "activation_db": total.get(node.name),
                "x86_saturation": weights[node.name]["x86_saturation"] if node.name in weights else None,
                "local_db": tally.local_db if tally else None,
                "complaint": tally.complaint(tolerance_of(stages)) if tally else None,
            }
        )
    return rows


def cumulative(stages: Stages) -> dict[str, float]:
    """SQNR of each of the artifact's layers against the float graph's, in dB, by node name."""
    session = stages.models.get(EXPORTED)
    if session is None or not ladder_local.shows_layers(session):
        return {}
    energies: dict[str, list[float]] = {}
    names = frozenset(n.name for n in stages.graph.graph.nodes if n.op == "call_function")
    for inputs in samples_of(stages.batches):
        stored = [ladder_local.door.into(a, s) for a, s in zip(inputs, session.inputs, strict=True)]
        given = ladder_local.layers_of(session, stored)
        values = float_values(stages.graph, inputs, names & set(given))
        for name, value in values.items():
            if value.size != given[name].size:
                continue
            expected = value.astype(np.float64).ravel()
            sums = energies.setdefault(name, [0.0, 0.0])
            sums[0] += float(np.sum(expected**2))
            sums[1] += float(np.sum((given[name].astype(np.float64).ravel() - expected) ** 2))
    return {n: metrics.ratio_db(s, e) for n, (s, e) in energies.items()}


def float_values(
    graph: GraphModule, inputs: Sequence[np.ndarray], names: frozenset[str]
) -> dict[str, np.ndarray]:
    """What the float graph gives for some of its nodes."""
    values: dict[str, np.ndarray] = {}
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in inputs]
    watch(graph, tensors, lambda n, v: values.update({n.name: v.numpy().copy()}), names)
    return values
