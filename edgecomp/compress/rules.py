"""Rules by name and type: which nodes of a graph a pattern means, and what is decided for them.

A pattern is a module name with wildcards (`blocks.0`, `head*`; what lies below a module belongs to it),
`type:` and the name of an operation (`type:conv2d`), or `node:` and the name of a node of the captured graph,
as sensitivity tables have it (`node:relu_1`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch.fx import GraphModule, Node

from edgecomp.compress.observe import Observer
from edgecomp.compress.rounding import Rounding
from edgecomp.compress.scales import ScaleGroups
from edgecomp.errors import InputError
from edgecomp.graph.patterns import fused_into


@dataclass(frozen=True)
class Rule:
    """What differs where a pattern matches; None keeps the global setting.

    `activation_bits` (8, 16) and `observer` hold for what the matching operations give; values that share a
    scale (pooling, reshape, concatenation) change together. `weight_bits` (4, 8) and `rounding` hold for
    their weights.
    """

    __pydantic_config__ = {"extra": "forbid"}

    activation_bits: int | None = None
    weight_bits: int | None = None
    observer: Observer | None = None
    rounding: Rounding | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("activation_bits", (8, 16)), ("weight_bits", (4, 8))):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise InputError(f"{name} of a rule is {value}; expected {allowed[0]} or {allowed[1]}")
        if self.observer is not None and self.observer not in get_args(Observer):
            raise InputError(
                f"observer of a rule is {self.observer!r}; expected one of {', '.join(get_args(Observer))}"
            )
        if self.rounding is not None and self.rounding not in get_args(Rounding):
            raise InputError(
                f"rounding of a rule is {self.rounding!r}; expected one of {', '.join(get_args(Rounding))}"
            )


Rules = Mapping[str, Rule]


def matches(node: Node, pattern: str) -> bool:
    """Whether a pattern means this node."""
    if pattern.startswith("type:"):
        parts = str(node.target).split(".")
        return len(parts) > 1 and fnmatch.fnmatch(parts[1], pattern.removeprefix("type:"))
    if pattern.startswith("node:"):
        return fnmatch.fnmatch(node.name, pattern.removeprefix("node:"))
    module = node.meta.get("module", "")
    return fnmatch.fnmatch(module, pattern) or module.startswith(pattern + ".")


def matching(graph_module: GraphModule, pattern: str, what: str) -> list[Node]:
    """All operations that a pattern means. Raises InputError when it means none: a typing error, no rule."""
    found = [n for n in graph_module.graph.nodes if n.op == "call_function" and matches(n, pattern)]
    if not found:
        modules = sorted({n.meta["module"] for n in graph_module.graph.nodes if n.meta.get("module")})
        raise InputError(
            f"{what} pattern {pattern!r} matches no module; modules are {', '.join(modules[:12])} ..."
        )
    return found


def excluded(graph_module: GraphModule, patterns: tuple[str, ...]) -> dict[str, str]:
    """Node name -> reason for every node that stays float. Raises InputError as `matching` does."""
    found: dict[str, str] = {}
    for pattern in patterns:
        nodes = matching(graph_module, pattern, "exclude")
        found.update(dict.fromkeys((n.name for n in nodes), f"excluded by {pattern!r}"))
    return found


def by_group(graph_module: GraphModule, rules: Rules, groups: ScaleGroups, field: str) -> dict[str, Any]:
    """Root of a scale group -> what the rules say of its `field`; a later rule wins, then the wider bits.

    A rule for a layer means the value that is kept of it: where an activation is fused into the layer, the
    activation's result.
    """
    fused = fused_into(graph_module.graph)
    found: dict[str, Any] = {}
    for pattern, rule in rules.items():
        value = getattr(rule, field)
        for node in matching(graph_module, pattern, "rule") if value is not None else ():
            name = fused.get(node.name, node.name)
            if name in groups.root:
                found[groups.find(name)] = value
    return found


def weight_bits(graph_module: GraphModule, rules: Rules, layers: Mapping[str, list[Node]]) -> dict[str, int]:
    """Weight name -> bits, for the weights that a rule means."""
    return _of_weights(graph_module, rules, layers, "weight_bits")


def roundings(
    graph_module: GraphModule, rules: Rules, layers: Mapping[str, list[Node]]
) -> dict[str, Rounding]:
    """Weight name -> how it is rounded, for the weights that a rule means."""
    return _of_weights(graph_module, rules, layers, "rounding")


def _of_weights(
    graph_module: GraphModule, rules: Rules, layers: Mapping[str, list[Node]], field: str
) -> dict[str, Any]:
    """What the rules say of a weight's `field`; a later rule wins."""
    found: dict[str, Any] = {}
    for pattern, rule in rules.items():
        value = getattr(rule, field)
        if value is not None:
            nodes = set(matching(graph_module, pattern, "rule"))
            found.update({n: value for n, users in layers.items() if nodes & set(users)})
    return found
