"""The dependency groups of a module: which channels of which layers can be removed together."""

from __future__ import annotations

import copy
import logging
import operator
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from edgecomp.compress import prune_rules, prune_rules_shape
from edgecomp.compress.prune_labels import FIXED, Dims, Labels, fixed
from edgecomp.errors import ModelError

# Importing a family fills the table of rules.
_FAMILIES = (prune_rules, prune_rules_shape)

Place = tuple[str, int]
"""A dimension of a parameter or buffer: (dotted name, dimension). `path#attribute` is a count of heads."""

# Attributes that count attention heads, and sizes that follow them.
HEADS = (
    "num_heads",
    "n_heads",
    "n_head",
    "nhead",
    "heads",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
)
# What takes a part of a packed weight, such as the queries' rows.
_PARTS = (
    operator.getitem,
    torch.ops.aten.select.int,
    torch.ops.aten.unflatten.int,
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
)
_FOLLOWING = ("attn_dim", "all_head_size", "inner_dim")


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that are chosen among: `members[i]` says which positions of which tensors unit i takes.

    `producers`: the dimensions that make the channels (a convolution's outputs); the others follow.
    """

    members: tuple[Mapping[Place, tuple[int, ...]], ...]
    producers: tuple[Place, ...]
    scales: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.members)

    @property
    def name(self) -> str:
        """The producing layers, first ones named."""
        layers = [name.rpartition(".")[0] or name for name, _ in self.producers]
        more = f" and {len(layers) - 2} more" if len(layers) > 2 else ""
        return ", ".join(layers[:2]) + more

    @property
    def channels(self) -> int:
        """Channels of the first producer that the whole group covers."""
        return sum(len(m[self.producers[0]]) for m in self.members)


@dataclass(frozen=True, eq=False)
class Analysis:
    """`groups` that can be pruned, and for every layer that cannot be the reason."""

    groups: tuple[Group, ...]
    kept: Mapping[str, str]


def analyse(module: nn.Module, inputs: Sequence[Tensor]) -> Analysis:
    """Trace the module with torch.export and find its groups.

    `inputs`: example tensors, batch 1. The module is not changed. Raises ModelError when torch.export
    cannot trace it.
    """
    trace = _Trace(_export(module, inputs), module)
    trace.run()
    return trace.analysis()


def _export(module: nn.Module, inputs: Sequence[Tensor]) -> Any:
    traced = copy.deepcopy(module).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            logging.disable(logging.ERROR)  # torch prints a traceback of its own beside the exception
            return torch.export.export(traced, tuple(inputs), strict=False)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ModelError(
                f"{type(module).__name__} cannot be traced by torch.export for pruning: "
                f"{' '.join(lines[:2])[:300]}; rewrite data-dependent control flow"
            ) from error
        finally:
            logging.disable(logging.NOTSET)


class _Trace:
    """Carries labels through the exported graph, one node after another."""

    def __init__(self, program: Any, module: nn.Module) -> None:
        self.module = module
        self.graph = program.graph
        self.labels = Labels()
        self._dims: dict[Node, Any] = {}
        self._tensor_of: dict[str, Dims] = {}
        self._name_of: dict[Node, str] = {}
        self._producers: list[Place] = []
        self._scales: list[str] = []
        signature = program.graph_signature
        self._names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def dims(self, node: Node) -> Any:
        return self._dims[node]

    def shape(self, node: Node) -> tuple[int, ...]:
        return tuple(int(n) for n in getattr(node.meta.get("val"), "shape", ()))

    def where(self, node: Node) -> str:
        stack = node.meta.get("nn_module_stack")
        return (list(stack.values())[-1][0] if stack else "") or str(node.name)

    def produced(self, weight: Node, dim: int) -> None:
        while weight.op == "call_function" and weight.target in _PARTS:
            weight = weight.args[0]  # a part of a packed weight
        if weight in self._name_of:
            self._producers.append((self._name_of[weight], dim))

    def scaled(self, weight: Node) -> None:
        if weight in self._name_of:
            self._scales.append(self._name_of[weight])

    def heads(self, node: Node) -> dict[str, int]:
        owner = self.module.get_submodule(self._owner(node))
        values = {name: vars(owner).get(name) for name in HEADS}
        config = getattr(owner, "config", None)
        values |= {name: getattr(config, name, None) for name in HEADS if values[name] is None}
        return {name: v for name, v in values.items() if isinstance(v, int) and v > 1}

    def counted(self, node: Node, attribute: str, dim: np.ndarray) -> None:
        owner = self._owner(node)
        if attribute not in vars(self.module.get_submodule(owner)):
            return  # read from a configuration that other modules share: it cannot change for one
        name = f"{owner}#{attribute}"
        if name in self._tensor_of:
            self.labels.unite(self._tensor_of[name][0], dim, owner)
        else:
            self._tensor_of[name] = [dim]

    def _owner(self, node: Node) -> str:
        stack = node.meta.get("nn_module_stack")
        return list(stack.values())[-1][0] if stack else ""

    def run(self) -> None:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._dims[node] = self._placeholder(node)
            elif node.op == "output":
                self._lock_outputs(node)
            elif node.target is operator.getitem:
                self._dims[node] = self._item(node)
            else:
                self._dims[node] = self._checked(node, prune_rules.apply(self, node))

    def _checked(self, node: Node, dims: Any) -> Any:
        """A rule whose answer does not fit the node's shape is not believed: all that goes in stays."""
        value = node.meta.get("val")
        if not hasattr(value, "shape") or [len(d) for d in dims] == list(value.shape):
            return dims
        return prune_rules.opaque(self, node)

    def _placeholder(self, node: Node) -> Dims:
        name = self._names.get(node.name)
        if name is None:
            return fixed(self.shape(node))
        self._name_of[node] = name
        self._tensor_of[name] = [self.labels.fresh(n) for n in self.shape(node)]
        return self._tensor_of[name]

    def _item(self, node: Node) -> Any:
        parts = self._dims[node.args[0]]
        index = node.args[1]
        return parts[index] if isinstance(index, int) and index < len(parts) else fixed(self.shape(node))

    def _lock_outputs(self, node: Node) -> None:
        for source in node.all_input_nodes:
            dims = self._dims[source]
            for each in dims if dims and isinstance(dims[0], list) else [dims]:
                for dim in each:
                    self.labels.lock(dim, "is an output of the model")

    def analysis(self) -> Analysis:
        units = self._units()
        producers = dict.fromkeys(self._producers)
        kept: dict[str, str] = {}
        by_signature: dict[Any, list[dict[Place, tuple[int, ...]]]] = defaultdict(list)
        for root, members in units.items():
            made = [p for p in producers if p in members]
            reason = self.labels.reason(root)
            if not made:
                continue
            if reason is not None:
                kept.update({_layer(name): reason for name, _ in made})
                continue
            signature = tuple(sorted((place, len(at)) for place, at in members.items()))
            by_signature[signature].append(members)
        groups = [
            Group(
                tuple(members),
                tuple(p for p in producers if p in members[0]),
                tuple(s for s in dict.fromkeys(self._scales) if (s, 0) in members[0]),
            )
            for members in by_signature.values()
        ]
        for group in groups:
            for name, _ in group.producers:
                kept.pop(_layer(name), None)
        return Analysis(tuple(groups), kept)

    def _units(self) -> dict[int, dict[Place, tuple[int, ...]]]:
        """Root label -> the positions, in every tensor, that carry it."""
        found: dict[int, dict[Place, list[int]]] = defaultdict(lambda: defaultdict(list))
        for name, dims in self._tensor_of.items():
            for axis, dim in enumerate(dims):
                for position, root in enumerate(self.labels.roots(dim)):
                    if root != FIXED:
                        found[int(root)][(name, axis)].append(position)
        return {r: {place: tuple(at) for place, at in places.items()} for r, places in found.items()}


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name


def kept_positions(module: nn.Module, removed: Sequence[tuple[Group, np.ndarray]]) -> dict[Place, np.ndarray]:
    """For every tensor dimension that loses channels, the positions that stay.

    `removed`: groups, each with the indices of the units that go.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    gone: dict[Place, set[int]] = defaultdict(set)
    for group, units in removed:
        for unit in units:
            for place, positions in group.members[int(unit)].items():
                gone[place].update(positions)
    sizes: dict[str, tuple[int, ...]] = {n: tuple(t.shape) for n, t in tensors.items()}
    sizes |= {n: (_count(module, n),) for n, _ in gone if "#" in n}
    return {
        (name, axis): np.setdiff1d(np.arange(sizes[name][axis]), sorted(positions))
        for (name, axis), positions in gone.items()
    }


def _count(module: nn.Module, name: str) -> int:
    owner, _, attribute = name.partition("#")
    return int(getattr(module.get_submodule(owner), attribute))


def set_counts(module: nn.Module, kept: Mapping[Place, np.ndarray]) -> None:
    """Give attributes that count heads their new values, and the sizes that follow them."""
    for (name, _), positions in kept.items():
        if "#" not in name:
            continue
        path, _, attribute = name.partition("#")
        owner, before = module.get_submodule(path), _count(module, name)
        setattr(owner, attribute, len(positions))
        for follower in _FOLLOWING if "key_value" not in attribute and "kv" not in attribute else ():
            if isinstance(vars(owner).get(follower), int):
                setattr(owner, follower, vars(owner)[follower] // before * len(positions))


def counts(module: nn.Module) -> dict[str, int]:
    """Every attribute that counts heads, or follows such a count: `path#attribute` -> value."""
    return {
        f"{path}#{name}": value
        for path, owner in module.named_modules()
        for name, value in vars(owner).items()
        if name in (*HEADS, *_FOLLOWING) and isinstance(value, int)
    }


def restore_counts(module: nn.Module, values: Mapping[str, int]) -> None:
    """Set what `counts` gave, on a fresh module of the same classes."""
    for name, value in values.items():
        path, _, attribute = name.partition("#")
        setattr(module.get_submodule(path), attribute, value)


def shrunk(module: nn.Module, kept: Mapping[Place, np.ndarray]) -> dict[str, Tensor]:
    """Name -> smaller tensor, for every tensor that loses channels."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    result: dict[str, Tensor] = {}
    for (name, axis), positions in kept.items():
        if "#" in name:
            continue
        tensor = result.get(name, tensors[name].detach())
        result[name] = tensor.index_select(axis, torch.from_numpy(positions))
    return result
