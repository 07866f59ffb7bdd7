"""Before an export: which operations a target will run in integers, in float, or not at all, and why.

Nothing is calibrated. The graph is captured and given a plan whose scales mean nothing: what decides is which
values have a scale, not how large it is. The target's exporter then says what it would write, and what the
runtime will make of it. `against` puts it beside what the runtime made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from edgecomp import manifest, pipeline_export, registry
from edgecomp.compress import plan, scales
from edgecomp.compress.ptq import example_inputs
from edgecomp.errors import InputError
from edgecomp.graph import capture, constants
from edgecomp.loading import open_data
from edgecomp.pipeline_export import bits_for
from edgecomp.pipeline_single import Model, read_preprocessing
from edgecomp.spec import Candidate, Data, Forecast, OpPlacement, TensorSpec

_OF_POSITIVES = {torch.ops.aten.rsqrt.default, torch.ops.aten.sqrt.default, torch.ops.aten.log.default}
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in')
# Wider integers are positions and shapes.
_STANDS_FOR_REALS = re.compile(r"u?int(1|2|3|4|6|8|16)")
# Frames of these are the library's, not the user's.
_LIBRARY = ("/torch/", "<")


def forecast(candidate: Candidate, target: str) -> list[dict[str, Any]]:
    """Rows of `edgecomp.spec.Forecast` as mappings; `line`: `file.py:12` of the user's code, or None.

    Operations that the target cannot express come first, with `runs` "none"; the others are then not told.
    Raises UnknownNameError for a target that tells no forecast.
    """
    ready = planned(candidate, bits_for(target))
    lines = source_lines(ready.module)
    exporter = pipeline_export.make_exporter(target, {})
    problems = exporter.problems(ready)
    if problems:
        rows = [Forecast("", p.op, p.module, "none", p.reason, "") for p in problems]
    else:
        rows = registry.load("forecasts", registry.format_of(target))(ready, target)
    return [{**asdict(r), "line": lines.get(r.node) or lines.get(f"module {r.module}")} for r in rows]


def planned(candidate: Candidate, bits: int = 8) -> Candidate:
    """The candidate with a plan of the right structure and arbitrary scales; one that has a plan keeps it."""
    if candidate.quantization is not None:
        return candidate
    graph = capture(candidate.module, example_inputs(candidate))
    groups = scales.group(graph, bits)
    ranges = _ranges(graph, groups)
    decided = plan.activations(groups, ranges, plan.activation_spec(bits))
    weights = plan.weights(graph, decided, {}, 8)
    return replace(candidate, module=graph, quantization=plan.assemble(graph, decided, weights, {}))


def _ranges(graph: GraphModule, groups: scales.ScaleGroups) -> dict[str, tuple[float, float]]:
    """-1 to 1 for what only data could tell, 0 to 1 for what a root or a logarithm is taken of.

    Constants have their own range, and products with a constant that much of the other operand's: runtimes
    refuse operands whose scales are too far apart, as small constants and layer scales make them.
    """
    ranges = dict.fromkeys(groups.root, (-1.0, 1.0))
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.name in ranges:
            value = constants.value_of(graph, node)
            ranges[node.name] = (float(value.min()), float(value.max())) if value.numel() else (0.0, 0.0)
        elif node.target is torch.ops.aten.mul.Tensor and node.name in ranges:
            largest = 1.0
            for operand in node.all_input_nodes:
                largest *= max(map(abs, ranges.get(operand.name, (-1.0, 1.0))))
            ranges[node.name] = (-largest, largest)
    rooted = {a.name for n in graph.graph.nodes if n.target in _OF_POSITIVES for a in n.all_input_nodes}
    for members in groups.members().values():
        if rooted & set(members):
            ranges.update(dict.fromkeys(members, (0.0, 1.0)))
    return ranges


def source_lines(graph: GraphModule) -> dict[str, str]:
    """Graph node -> `file.py:12`, the innermost line of the user's code; `module NAME` -> its first one."""
    found: dict[str, str] = {}
    for node in graph.graph.nodes:
        frames = _FRAME.findall(node.meta.get("stack_trace") or "")
        own = [f for f in frames if not any(word in f[0] for word in _LIBRARY)]
        if own:
            line = f"{Path(own[-1][0]).name}:{own[-1][1]}"
            found[node.name] = line
            found.setdefault(f"module {node.meta.get('module', '')}", line)
    return found


def of_model(
    model: Model, target: str, data: str | None = None, preprocessing: Path | None = None
) -> dict[str, Any]:
    """The forecast of a MODEL argument: `model`, `target`, `rows[]`. Raises ModelError, DataError."""
    source = open_data(data, read_preprocessing(preprocessing) if preprocessing else None) if data else None
    candidate, _ = model.load(Data(evaluation=source))
    return {"model": model.spec, "target": target, "rows": forecast(candidate, target)}


def of_artifact(path: Path, model: Model) -> dict[str, Any]:
    """What was forecast from MODEL for an artifact's target, beside what its runtime made: see `against`.

    Raises InputError for an artifact without a manifest, whose target is unknown.
    """
    if not manifest.path_of(path).exists():
        raise InputError(
            f"{path} has no manifest beside it, so its target is unknown: export it with edgecomp"
        )
    artifact = manifest.read(path)
    shapes = tuple(_in_torch_order(spec) for spec in artifact.inputs)
    candidate, _ = replace(model, input_shapes=model.input_shapes or shapes).load(Data())
    session = registry.load("runtimes", registry.format_of(path.suffix))().open(path)
    found = against(forecast(candidate, artifact.target), realized(session))
    return {"model": model.spec, "target": artifact.target, **found}


def _in_torch_order(spec: TensorSpec) -> tuple[int, ...]:
    return spec.shape if spec.layout != "NHWC" else tuple(spec.shape[i] for i in (0, 3, 1, 2))


def realized(session: Any) -> list[OpPlacement]:
    """What became of operations, under the names that a forecast has, where a session can tell."""
    made: list[OpPlacement] = session.realized() if hasattr(session, "realized") else session.placement()
    return made


def against(told: Sequence[Mapping[str, Any]], actual: Sequence[OpPlacement]) -> dict[str, Any]:
    """Forecast beside what the runtime made of the artifact, operation by operation.

    `rows[]`: the forecast's, with `actual` (integer, float, index, or inside another) and `actual_on`.
    `integer`, and `delegated` where the forecast names a place: `told`, `was`, `hits`, `precision`, `recall`
    over the operations that the runtime runs on their own. `differ`: how many run otherwise than told.
    """
    seen = {op.name: op for op in actual}
    rows = [{**row, **_made(seen.get(row["name"]))} for row in told if row["runs"] != "none"]
    judged = [r for r in rows if r["actual"] in ("integer", "float")]
    placed = [r for r in judged if r["placed_on"]]
    return {
        "rows": rows,
        "operations": len(judged),
        "integer": _score([(r["runs"] == "integer", r["actual"] == "integer") for r in judged]),
        "delegated": _score([(r["placed_on"] != "CPU", r["actual_on"] != "CPU") for r in placed]),
        "differ": sum(r["runs"] != r["actual"] for r in judged),
    }


def _score(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any] | None:
    """Of (told, was): counts, precision and recall; None without pairs."""
    if not pairs:
        return None
    told, was = sum(t for t, _ in pairs), sum(w for _, w in pairs)
    hits = sum(t and w for t, w in pairs)
    scores = {"precision": hits / told if told else None, "recall": hits / was if was else None}
    return {"told": told, "was": was, "hits": hits, **scores}


def _made(op: OpPlacement | None) -> dict[str, str]:
    if op is None or op.dtype == "":
        return {"actual": "inside", "actual_on": ""}
    if _STANDS_FOR_REALS.fullmatch(op.dtype):
        return {"actual": "integer", "actual_on": op.placed_on}
    return {"actual": "float" if op.dtype.startswith("float") else "index", "actual_on": op.placed_on}
