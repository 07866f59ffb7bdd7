"""Bits by layer from sensitivity: 16 for activations where 8 cost most, 4 for weights where 4 cost least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edgecomp import pipeline_steps as stepping
from edgecomp.compress import observe, sensitivity, wider
from edgecomp.compress.ptq import Quantize, calibration_source
from edgecomp.compress.rules import Rule
from edgecomp.compress.sensitivity import Sensitivity
from edgecomp.errors import ModelError
from edgecomp.spec import Candidate, Data, DataSource

_SAMPLES = 4
"""Samples for sensitivities: noises differ between roundings by far more than between samples."""


def measured(candidate: Candidate, source: DataSource, samples: int = _SAMPLES) -> list[Sensitivity]:
    """Sensitivity of every rounding in a quantized candidate, most harmful first."""
    if candidate.quantization is None:
        raise ModelError("sensitivity is measured on a quantized candidate; quantize it first")
    batches = observe.tensor_batches(source, samples)
    return sensitivity.measure(candidate.module, candidate.quantization, batches)


def activation_noise(found: Sequence[Sensitivity]) -> float:
    """Noise power of all activations over the outputs' power, as their sensitivities add up."""
    return sum(s.noise for s in found if s.kind == "activation")


def wider_activations(candidate: Candidate, found: Sequence[Sensitivity], to_noise: float) -> dict[str, Rule]:
    """Rules for the fewest values whose 16 bits leave `to_noise` of all activations' noise (`measured`).

    Inputs and outputs of the model keep their width (the door of the file), and so does `log_softmax`.
    """
    return wider.rules_for(wider.choose(candidate.module, found, to_noise))


def float_operations(candidate: Candidate, found: Sequence[Sensitivity], to_noise: float) -> tuple[str, ...]:
    """Patterns for the operations that stay float so that `to_noise` is left of all noise.

    A weight that costs most takes its layers along, an activation what gives it and what reads it: only
    then is it not rounded. The doors of the model stay integers.
    """
    nodes = {n.name: n for n in candidate.module.graph.nodes}
    left = sum(s.noise for s in found)
    names: dict[str, None] = {}
    for each in found:
        if left <= to_noise:
            break
        left -= each.noise
        for node in (nodes[n] for n in each.nodes):
            around = [node] if each.kind == "weight" else [node, *node.users]
            names.update(dict.fromkeys(f"node:{n.name}" for n in around if n.op == "call_function"))
    return tuple(names)


def fewer_weight_bits(candidate: Candidate, data: Data, step: Quantize, size_bytes: int) -> dict[str, Rule]:
    """Rules for 4-bit weights until all weights fit: the least noise for each byte saved comes first.

    Raises ModelError when they do not fit with 4 bits everywhere.
    """
    eight = step(candidate, data)
    size = int(stepping.count(eight)["size_bytes"])
    if size <= size_bytes:
        return {}
    four = replace(step, weight_bits=4)(candidate, data)
    found = [s for s in measured(four, calibration_source(data)) if s.kind == "weight" and s.bits == 4]
    rules: dict[str, Rule] = {}
    for each in sorted(found, key=lambda s: s.noise / s.elements):
        if size <= size_bytes:
            return rules
        size -= each.elements // 2
        rules.update({f"node:{n}": Rule(weight_bits=4) for n in each.nodes})
    if size > size_bytes:
        raise ModelError(
            f"the weights take {size:,} bytes with 4 bits everywhere; size_bytes is {size_bytes:,}: "
            "raise it, or prune first"
        )
    return rules


def table(found: Sequence[Sensitivity]) -> list[dict[str, Any]]:
    """Rows for a report: kind, name, module, bits, sqnr_db and the share of all noise, most harmful first."""
    total = sum(s.noise for s in found) or 1.0
    return [
        {
            "kind": s.kind, "name": s.name, "module": s.module, "bits": s.bits, "sqnr_db": s.sqnr_db,
            "share": s.noise / total, "elements": s.elements,
        }
        for s in found
    ]  # fmt: skip
