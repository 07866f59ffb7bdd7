"""A candidate on disk: tensors and plain values only, read with `torch.load(weights_only=True)`.

A float candidate is stored as MODEL's spec and a state dict; the tensors' shapes alone say what pruning
removed, so loading builds the model afresh and shrinks it to fit. A quantized candidate is its canonical
graph as plain data, with the plan, and needs no user code. See docs/decisions/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from edgecomp import files, models
from edgecomp.compress import attention, layers, prune_groups, resize
from edgecomp.errors import ModelError
from edgecomp.graph import store
from edgecomp.spec import (
    Candidate,
    QuantizationPlan,
    QuantSpec,
    StepRecord,
    TensorQuantization,
    TensorSpec,
)

_VERSION = 1


@dataclass(frozen=True)
class Origin:
    """Where a model came from: MODEL's spec and the weights file loaded into it, if any."""

    model: str
    weights: Path | None = None

    def load(self) -> Any:
        return models.load_model(self.model, self.weights)


def save(candidate: Candidate, origin: Origin, path: Path) -> None:
    """Write a checkpoint atomically. Raises OutputError when the folder cannot be written."""
    facts: dict[str, Any] = {
        "edgecomp_checkpoint": _VERSION,
        "model": models.resolved(origin.model),
        "weights": str(origin.weights.resolve()) if origin.weights else None,
        "inputs": [_plain(asdict(spec)) for spec in candidate.inputs],
        "history": [_plain(asdict(record)) for record in candidate.history],
    }
    if candidate.quantization is None:
        facts["state"] = {n: t.contiguous() for n, t in candidate.module.state_dict().items()}
        facts["counts"] = prune_groups.counts(candidate.module)
        facts["heads"] = attention.opened(candidate.module)
    else:
        facts["graph"] = store.to_plain(candidate.module)
        facts["plan"] = _plan_to_plain(candidate.quantization)
    with files.atomic(path) as temporary:
        torch.save(facts, temporary)


def load(path: Path, model: str | None = None) -> tuple[Candidate, Origin]:
    """The candidate again, its float original included, and where it came from.

    `model`: MODEL's spec, when it is not where the checkpoint says any more. Raises ModelError.
    """
    facts = models.read_tensors(path)
    if not is_checkpoint(facts):
        raise ModelError(
            f"{path} is not a checkpoint of edgecomp; to load plain weights give MODEL and --weights {path}"
        )
    weights = Path(facts["weights"]) if facts["weights"] else None
    origin = Origin(model or facts["model"], weights)
    original = origin.load()
    inputs = tuple(TensorSpec(**{**t, "shape": tuple(t["shape"])}) for t in facts["inputs"])
    plan = None
    module: torch.nn.Module
    if "graph" in facts:
        zeros = tuple(torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in inputs)
        module = store.from_plain(facts["graph"], zeros)
        plan = _plan_from_plain(facts["plan"], module)
    else:
        module = origin.load()
        for record in _history(facts):
            if record.name == "drop-layers":
                layers.drop_recorded(module, record)
        attention.open_heads(module, facts.get("heads", ()))
        resize.adopt(module, facts["state"])
        prune_groups.restore_counts(module, facts["counts"])
    return Candidate(module.eval(), inputs, plan, _history(facts), original), origin


def is_checkpoint(facts: object) -> bool:
    """True for what `save` wrote. Raises ModelError for a version that this edgecomp does not read."""
    if not isinstance(facts, Mapping) or "edgecomp_checkpoint" not in facts:
        return False
    if facts["edgecomp_checkpoint"] != _VERSION:
        raise ModelError(
            f"the checkpoint has version {facts['edgecomp_checkpoint']}; this edgecomp reads {_VERSION}: "
            "use the edgecomp that wrote it"
        )
    return True


def _history(facts: Mapping[str, Any]) -> tuple[StepRecord, ...]:
    return tuple(StepRecord(r["name"], r["kind"], r["settings"], tuple(r["notes"])) for r in facts["history"])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _plan_to_plain(plan: QuantizationPlan) -> dict[str, Any]:
    return {
        "activations": {n: _tensor_to_plain(q) for n, q in plan.activations.items()},
        "weights": {n: _tensor_to_plain(q) for n, q in plan.weights.items()},
        "float_nodes": dict(plan.float_nodes),
    }


def _plan_from_plain(facts: Mapping[str, Any], module: torch.nn.Module) -> QuantizationPlan:
    plan = QuantizationPlan(
        {n: _tensor_from_plain(q) for n, q in facts["activations"].items()},
        {n: _tensor_from_plain(q) for n, q in facts["weights"].items()},
        facts["float_nodes"],
    )
    known = {n.name for n in module.graph.nodes} if isinstance(module, GraphModule) else set()
    lost = [n for n in plan.activations if n not in known]
    if lost:
        raise ModelError(
            f"the checkpoint's plan names node {lost[0]!r}, which its graph lacks; quantize again"
        )
    return plan


def _tensor_to_plain(quantization: TensorQuantization) -> dict[str, Any]:
    arrays = {"scale": quantization.scale, "zero_point": quantization.zero_point}
    if quantization.values is not None:
        arrays["values"] = quantization.values
    return {"spec": asdict(quantization.spec), **{k: torch.from_numpy(a.copy()) for k, a in arrays.items()}}


def _tensor_from_plain(facts: Mapping[str, Any]) -> TensorQuantization:
    def array(key: str) -> np.ndarray | None:
        value: Tensor | None = facts.get(key)
        return None if value is None else value.numpy()

    scale, zero_point = array("scale"), array("zero_point")
    if scale is None or zero_point is None:
        raise ModelError("the checkpoint's plan lacks a scale or a zero point; quantize again")
    return TensorQuantization(QuantSpec(**facts["spec"]), scale, zero_point, array("values"))
