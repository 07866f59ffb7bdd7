"""Unstructured and N:M magnitude pruning: weights become zero, shapes stay."""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgecomp.compress.macs import count_parameters
from edgecomp.compress.train import check
from edgecomp.errors import ModelError, RecipeError
from edgecomp.spec import Candidate, Data, StepRecord

WEIGHTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@dataclass(frozen=True)
class PruneMagnitude:
    """Set the smallest weights to zero (Han et al. 2015), or N of every M in a row (Mishra et al. 2021).

    Give `sparsity` (the fraction of weights that becomes zero; over all layers with `scope` global, in each
    with layer) or `pattern`, such as "2:4": of every 4 weights along the input dimension the 2 smallest go.
    `exclude`: patterns of module names that stay dense. `rules`: pattern of a module name, or `type:Linear`,
    -> the sparsity of that layer alone; a name goes before a type, and both before `sparsity`. Zeros stay
    zero in later training steps.
    A zero saves bytes once the file is compressed; it saves time only on a runtime with sparse kernels.

    Example: pattern 2:4 turns the row [3, -1, 0.5, 2] into [3, 0, 0, 2].
    """

    sparsity: float | None = None
    pattern: str | None = None
    scope: Literal["global", "layer"] = "global"
    exclude: tuple[str, ...] = ()
    rules: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.pattern is None):
            raise RecipeError(
                f"prune-magnitude has sparsity {self.sparsity} and pattern {self.pattern}; expected one "
                "of the two, for example sparsity: 0.5 or pattern: '2:4'"
            )
        check("sparsity", self.sparsity, self.sparsity is None or 0 < self.sparsity < 1, "between 0 and 1")
        check("scope", self.scope, self.scope in ("global", "layer"), "global or layer")
        if self.pattern is not None:
            n_of_m(self.pattern)
            check("rules", dict(self.rules), not self.rules, "none beside pattern, which leaves no choice")
        for name, value in self.rules.items():
            check(f"rules[{name!r}]", value, 0 <= value < 1, "a sparsity from 0 to below 1")

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        if candidate.quantization is not None:
            raise ModelError(
                "step 'prune-magnitude' comes after quantize, whose weights are fixed; put it before"
            )
        module = copy.deepcopy(candidate.module).eval()
        layers, skipped = weighted(module, self.exclude)
        if not layers:
            raise ModelError(f"{type(module).__name__} has no convolution or linear layer left to prune")
        if self.pattern is not None:
            zeroed, kept = n_of_m(self.pattern)
            for name in list(layers):
                block, inputs = zeroed + kept, layers[name].weight[0].numel()
                if not zero_n_of_m(layers[name].weight, zeroed, block):
                    skipped.append(f"{name} not pruned: {inputs} inputs are no multiple of {block}")
        else:
            self._zero(layers)
        total, nonzero = count_parameters(module)
        notes = (f"{total - nonzero:,} of {total:,} parameters are zero", *skipped)
        record = StepRecord("prune-magnitude", "prune", asdict(self), notes)
        original = candidate.original if candidate.original is not None else candidate.module
        return replace(candidate, module=module, history=(*candidate.history, record), original=original)

    def _zero(self, layers: Mapping[str, Any]) -> None:
        """Layers with a rule by themselves, the others as `scope` says. Raises RecipeError."""
        ruled = {n: ruled_value(self.rules, n, layer) for n, layer in layers.items()}
        for pattern in self.rules:
            if not any(fits(pattern, n, layer) for n, layer in layers.items()):
                raise RecipeError(
                    f"rule {pattern!r} matches no layer; first are {', '.join([*layers][:8])}; types are "
                    f"{', '.join(sorted({type(x).__name__ for x in layers.values()}))}"
                )
        for name, value in ruled.items():
            if value is not None:
                zero_smallest([layers[name].weight], value, "layer")
        others = [layers[n].weight for n, value in ruled.items() if value is None]
        if others:
            zero_smallest(others, float(self.sparsity or 0), self.scope)


def fits(pattern: str, name: str, layer: nn.Module) -> bool:
    """Does a rule's pattern, of a module name or `type:Linear`, mean this layer?"""
    if pattern.startswith("type:"):
        return type(layer).__name__ == pattern[5:]
    return fnmatch.fnmatch(name, pattern)


def ruled_value(rules: Mapping[str, float], name: str, layer: nn.Module) -> float | None:
    """What the rules say of a layer: by its name, else by its type, else None."""
    for by_type in (False, True):
        for pattern, value in rules.items():
            if pattern.startswith("type:") == by_type and fits(pattern, name, layer):
                return value
    return None


def weighted(module: nn.Module, exclude: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """Name -> convolution or linear layer, and notes on the excluded ones. Raises RecipeError."""
    found = {n: m for n, m in module.named_modules() if isinstance(m, WEIGHTED)}
    for pattern in exclude:
        if not fnmatch.filter(found, pattern):
            raise RecipeError(
                f"exclude pattern {pattern!r} matches no layer; first are {', '.join([*found][:8])}"
            )
    out = {n for n in found if any(fnmatch.fnmatch(n, p) for p in exclude)}
    skipped = [f"{n} not pruned: excluded" for n in found if n in out]
    return {n: m for n, m in found.items() if n not in out}, skipped


def n_of_m(pattern: str) -> tuple[int, int]:
    """`2:4` -> (2 zeros, 2 kept). Raises RecipeError."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise RecipeError(f"pattern is {pattern!r}; expected N:M with N below M, for example '2:4'")
    kept, block = int(match[1]), int(match[2])
    return block - kept, kept


@torch.no_grad()
def zero_smallest(weights: Iterable[Tensor], sparsity: float, scope: str) -> None:
    """Zero the given fraction of smallest magnitudes, over all tensors together or in each."""
    weights = list(weights)
    if scope == "layer":
        for weight in weights:
            _zero_below(weight, sparsity)
        return
    flat = torch.cat([w.abs().flatten() for w in weights])
    mask = _smallest(flat, sparsity)
    start = 0
    for weight in weights:
        weight[mask[start : start + weight.numel()].view_as(weight)] = 0.0
        start += weight.numel()


def _zero_below(weight: Tensor, sparsity: float) -> None:
    weight[_smallest(weight.abs().flatten(), sparsity).view_as(weight)] = 0.0


def _smallest(values: Tensor, fraction: float) -> Tensor:
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[torch.argsort(values, stable=True)[: round(len(values) * fraction)]] = True
    return mask


@torch.no_grad()
def zero_n_of_m(weight: Tensor, zeroed: int, block: int) -> bool:
    """Zero the `zeroed` smallest of every `block` weights along the inputs; False when they do not divide."""
    rows = weight.reshape(weight.shape[0], -1)
    if rows.shape[1] % block:
        return False
    blocks = rows.reshape(-1, block)
    smallest = blocks.abs().argsort(dim=1, stable=True)[:, :zeroed]
    weight.copy_(blocks.scatter(1, smallest, 0.0).reshape(weight.shape))
    return True
