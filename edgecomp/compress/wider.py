"""16 bits for the fewest values whose 8 bits cost too much: a choice by measured noise.

Each scale group of activations is rounded alone (`sensitivity`); noise powers nearly add up, so taking the
loudest ones away until the rest sums to the target needs no search. Outliers make a few values of a network
that is otherwise quiet cost almost everything: residual streams and what feeds and follows them in
transformers, door-side layers of small convolutional nets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from edgecomp.compress import sensitivity
from edgecomp.compress.rules import Rule
from edgecomp.compress.sensitivity import Sensitivity
from edgecomp.graph.vocabulary import FIXED_8, FIXED_16

_REST = 0.25


def choose(graph_module: GraphModule, found: Sequence[Sensitivity], to_noise: float) -> list[Sensitivity]:
    """The fewest 8-bit values that must have 16 bits for the noise of all activations to sum to `to_noise`.

    `found`: sensitivities of a plan (weights among them do not count). Inputs and outputs of the model keep
    their width (the door of the file), and so do `log_softmax` and divisors, whose 8 bits tell that they are
    never negative (16 are symmetric). Where these alone make more noise than `to_noise`, the rest is brought
    down to a quarter of theirs: more would gain less than 1 dB.
    """
    noises = [s for s in found if s.kind == "activation"]
    outputs = {n.name for n in graph_module.graph.find_nodes(op="output")[0].all_input_nodes}
    inside = {n.name for n in graph_module.graph.nodes if _has_16(n.op, n.target)}
    kept = outputs | _divisors(graph_module)
    movable = [s for s in noises if s.bits == 8 and inside.issuperset(s.nodes) and kept.isdisjoint(s.nodes)]
    fixed = sum(s.noise for s in noises) - sum(s.noise for s in movable)
    left = to_noise - fixed if to_noise > fixed else _REST * fixed
    return sensitivity.worst(movable, "activation", left)


def _divisors(graph_module: GraphModule) -> set[str]:
    divisions = (n for n in graph_module.graph.nodes if n.target is torch.ops.aten.div.Tensor)
    return {n.args[1].name for n in divisions if isinstance(n.args[1], Node)}


def _has_16(op: str, target: object) -> bool:
    return op == "call_function" and (target not in FIXED_8 or target in FIXED_16)


def rules_for(chosen: Sequence[Sensitivity]) -> dict[str, Rule]:
    """Rules that give each chosen value 16 bits."""
    return {f"node:{s.name}": Rule(activation_bits=16) for s in chosen}


def notes(chosen: Sequence[Sensitivity], left: float) -> tuple[str, ...]:
    """What was widened and why, most harmful first. `left`: noise of activations that remains, predicted."""
    if not chosen:
        return ()
    first = (
        f"16-bit activations in {len(chosen)} places, for a predicted {sensitivity.decibels(left):.1f} dB "
        "of activations:"
    )
    lines = (f"{s.name} in {s.module or 'the model'}: {s.sqnr_db:.1f} dB alone with 8 bits" for s in chosen)
    return (first, *lines)
