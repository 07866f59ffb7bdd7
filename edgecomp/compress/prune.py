"""Structured pruning: channels are removed for good, so every later stage works on smaller tensors."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp import progress
from edgecomp.compress import attention, recover, resize
from edgecomp.compress import macs as counting
from edgecomp.compress import prune_groups as groups_of
from edgecomp.compress.prune_groups import Analysis, Group, Place
from edgecomp.compress.prune_scores import CRITERIA, Criterion, element_scores, unit_scores
from edgecomp.compress.train import check
from edgecomp.errors import ModelError, RecipeError
from edgecomp.spec import Candidate, Data, StepRecord

Recovery = Literal["least-squares", "none"]

_SEARCH_STEPS = 12


@dataclass(frozen=True)
class PruneChannels:
    """Remove the least important channels, neurons and attention heads, coupled ones together.

    Give `sparsity` (the fraction of each group's channels that goes), `macs` or `params` (what may remain: a
    fraction of the multiply-accumulates or parameters, or their number when above 1). `scope` group: every
    group loses the same fraction; global: the lowest scores of the whole model go. Kept channels are a
    multiple of `round_to`.
    `exclude`: patterns of module names whose outputs stay. `max_sparsity` bounds what one group can lose.
    `rules`: pattern of a module name, or `type:Linear`, -> the sparsity of its group (0: it stays); a name
    goes before a type, and both before the step's own setting. `recovery` least-squares fits the layers that
    lost inputs to the original's outputs on `samples` samples without labels, of the calibration data or else
    of the training data (`compress/recover.py`); without either, weights stay as they are.

    Example: a convolution of 64 channels with sparsity 0.3 and round_to 8 keeps 48 (64 * 0.7 = 44.8).
    """

    sparsity: float | None = None
    macs: float | None = None
    params: float | None = None
    criterion: Criterion = "l2"
    scope: Literal["group", "global"] = "group"
    round_to: int = 8
    max_sparsity: float = 0.9
    exclude: tuple[str, ...] = ()
    rules: Mapping[str, float] = field(default_factory=dict)
    samples: int = 512
    recovery: Recovery = "least-squares"
    seed: int = 0

    def __post_init__(self) -> None:
        if sum(a is not None for a in (self.sparsity, self.macs, self.params)) != 1:
            raise RecipeError(
                f"prune has sparsity {self.sparsity}, macs {self.macs} and params {self.params}; expected "
                "one of the three, for example sparsity: 0.3 or macs: 0.5"
            )
        check("sparsity", self.sparsity, self.sparsity is None or 0 < self.sparsity < 1, "between 0 and 1")
        check("macs", self.macs, self.macs is None or self.macs > 0, "a fraction that remains, or a number")
        check("params", self.params, self.params is None or self.params > 0, "what remains, or a number")
        check("criterion", self.criterion, self.criterion in CRITERIA, f"one of {', '.join(CRITERIA)}")
        check("scope", self.scope, self.scope in ("group", "global"), "group or global")
        for pattern, value in self.rules.items():
            check(f"rules[{pattern!r}]", value, 0 <= value < 1, "a sparsity from 0 to below 1")
        check("round_to", self.round_to, self.round_to >= 1, "1 or more")
        check("max_sparsity", self.max_sparsity, 0 < self.max_sparsity < 1, "between 0 and 1")
        known = ("least-squares", "none")
        check("recovery", self.recovery, self.recovery in known, " or ".join(known))

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        """A candidate with a smaller module; what was removed, and what was not and why, in its notes.

        Raises ModelError when nothing can be pruned or the budget cannot be met.
        """
        if candidate.quantization is not None:
            raise ModelError(
                "step 'prune' comes after quantize, whose weights are fixed; put it before quantize"
            )
        inputs = example_inputs(candidate)
        module = copy.deepcopy(candidate.module).eval()
        attention.open_heads(module)
        analysis = prunable(module, inputs, self.exclude)
        scores = self._scores(module, analysis, data)
        types = {n: type(m).__name__ for n, m in module.named_modules()}
        ruled = [self._rule(g, types) for g in analysis.groups]
        units = self._chosen(module, analysis.groups, scores, inputs, ruled)
        original = copy.deepcopy(module)
        kept = remove(module, list(zip(analysis.groups, units, strict=True)))
        notes = (
            *_sizes(original, module, inputs),
            *self._recovered(original, module, kept, data),
            *_removed_notes(analysis.groups, units, self.round_to),
            *(f"{layer} not pruned: {reason}" for layer, reason in analysis.kept.items()),
        )
        record = StepRecord("prune", "prune", asdict(self), notes)
        return replace(
            candidate,
            module=module,
            history=(*candidate.history, record),
            original=candidate.original if candidate.original is not None else candidate.module,
        )

    def _recovered(
        self, original: nn.Module, pruned: nn.Module, kept: Mapping[Place, np.ndarray], data: Data
    ) -> tuple[str, ...]:
        source = data.calibration or data.train
        if self.recovery == "none" or source is None:
            return ()
        return recover.refit(original, pruned, kept, source, self.samples)

    def _scores(self, module: nn.Module, analysis: Analysis, data: Data) -> list[np.ndarray]:
        elements = element_scores(module, self.criterion, data.train, self.samples)
        generator = np.random.default_rng(self.seed)
        return [unit_scores(g, elements, self.criterion, generator) for g in analysis.groups]

    def _chosen(
        self,
        module: nn.Module,
        groups: Sequence[Group],
        scores: Sequence[np.ndarray],
        inputs: tuple[Tensor, ...],
        ruled: Sequence[float | None],
    ) -> list[np.ndarray]:
        if self.sparsity is not None:
            return self._units(groups, scores, self.sparsity, ruled)
        what, count = self._counted(inputs)
        total, wanted = count(module), float(self.macs or self.params or 0)
        budget = wanted * (total if wanted <= 1 else 1)

        def left(units: Sequence[np.ndarray]) -> int:
            trial = copy.deepcopy(module)
            remove(trial, list(zip(groups, units, strict=True)))
            return count(trial)

        def remaining(sparsity: float) -> int:
            return left(self._units(groups, scores, sparsity, ruled))

        smallest = _smallest(remaining, budget, self.max_sparsity, total, what)
        units = self._units(groups, scores, smallest, ruled)
        return self._put_back(groups, scores, units, ruled, lambda u: left(u) <= budget)

    def _counted(self, inputs: tuple[Tensor, ...]) -> tuple[str, Callable[[nn.Module], int]]:
        """What the budget is of: its name, and how it is counted."""
        if self.params is not None:
            return "parameters", lambda module: counting.count_parameters(module)[0]
        return "multiply-accumulates", lambda module: counting.count_macs(module, inputs)

    def _put_back(
        self,
        groups: Sequence[Group],
        scores: Sequence[np.ndarray],
        units: list[np.ndarray],
        ruled: Sequence[float | None],
        fits: Callable[[Sequence[np.ndarray]], bool],
    ) -> list[np.ndarray]:
        """Use what the budget has left: each group, highest scores first, gets a step of units back."""
        steps = [step_of(self.round_to, g.channels // len(g)) for g in groups]
        free = [i for i, u in enumerate(units) if ruled[i] is None and len(u) >= steps[i]]
        worth = {i: float(scores[i][units[i][-steps[i] :]].mean()) for i in free}
        for index in sorted(free, key=lambda i: -worth[i]):
            fewer = list(units)
            fewer[index] = units[index][: -steps[index]]
            if fits(fewer):
                units = fewer
        return units

    def _rule(self, group: Group, types: Mapping[str, str]) -> float | None:
        """The sparsity that a rule gives the group: by the name of a producing layer, else by its type."""
        layers = [name.rpartition(".")[0] for name, _ in group.producers]
        for pattern, value in self.rules.items():
            if not pattern.startswith("type:") and fnmatch.filter(layers, pattern):
                return value
        for pattern, value in self.rules.items():
            if pattern.startswith("type:") and pattern[5:] in {types[n] for n in layers}:
                return value
        return None

    def _units(
        self,
        groups: Sequence[Group],
        scores: Sequence[np.ndarray],
        sparsity: float,
        ruled: Sequence[float | None],
    ) -> list[np.ndarray]:
        """For each group the indices of the units that go at this overall sparsity, lowest scores first."""
        if self.scope == "global" and groups:
            limit = float(np.quantile(np.concatenate(list(scores)), sparsity))
            wanted = [int((s < limit).sum()) for s in scores]
        else:
            wanted = [round(len(s) * sparsity) for s in scores]
        wanted = [
            c if r is None else round(len(g) * r) for g, c, r in zip(groups, wanted, ruled, strict=True)
        ]
        result = []
        for group, score, count in zip(groups, scores, wanted, strict=True):
            if count == 0:
                result.append(np.array([], dtype=np.int64))
                continue
            count = rounded(len(group), count, self.round_to, group.channels // len(group), self.max_sparsity)
            result.append(np.argsort(score, kind="stable")[:count])
        return result


class Pruning(Protocol):
    """A step that prunes channels on its way: it has these settings of `prune`."""

    @property
    def criterion(self) -> Criterion: ...
    @property
    def scope(self) -> Literal["group", "global"]: ...
    @property
    def round_to(self) -> int: ...
    @property
    def max_sparsity(self) -> float: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...
    @property
    def seed(self) -> int: ...


def to_macs(settings: Pruning, macs: float, recovery: Recovery = "least-squares") -> PruneChannels:
    """The `prune` that leaves so many multiply-accumulates, its other settings those of another step."""
    return PruneChannels(
        macs=macs,
        recovery=recovery,
        criterion=settings.criterion,
        scope=settings.scope,
        round_to=settings.round_to,
        max_sparsity=settings.max_sparsity,
        exclude=settings.exclude,
        seed=settings.seed,
    )


def rounded(units: int, remove: int, round_to: int, width: int, most: float) -> int:
    """How many of `units` to remove so that the channels kept (units * width) are a multiple of `round_to`.

    The nearest multiple is taken, at least one multiple and at least 1 - `most` of the group stay.
    """
    step = step_of(round_to, width)
    floor = max(1, int(np.ceil(units * (1 - most))))
    keep = max(step, round((units - remove) / step) * step)
    while keep < floor:
        keep += step
    return max(0, units - keep)


def step_of(round_to: int, width: int) -> int:
    """The fewest units of `width` channels that make a multiple of `round_to`."""
    return max(1, round_to // int(np.gcd(round_to, width)))


def remove(module: nn.Module, removed: Sequence[tuple[Group, np.ndarray]]) -> dict[Place, np.ndarray]:
    """Take units out of a module, in place; returns the positions that stay, where some went."""
    kept = groups_of.kept_positions(module, removed)
    resize.replace_tensors(module, groups_of.shrunk(module, kept))
    groups_of.set_counts(module, kept)
    return kept


def prunable(module: nn.Module, inputs: tuple[Tensor, ...], exclude: tuple[str, ...] = ()) -> Analysis:
    """The groups of a module that can be pruned, each one tried; the rest with reasons.

    Forward code may hold a channel count that no trace shows, so each group is halved once on a copy and
    the copy is run. Raises ModelError when no group is left, RecipeError for a pattern without a match.
    """
    analysis = groups_of.analyse(module, inputs)
    kept = dict(analysis.kept)
    good = []
    layers = {n.rpartition(".")[0] for n, _ in module.named_parameters()}
    for pattern in exclude:
        if not fnmatch.filter(layers, pattern):
            raise RecipeError(f"exclude pattern {pattern!r} matches no layer; layers are {_some(layers)}")
    together = _failure(module, [g for g in analysis.groups if not _excluded(g, exclude)], inputs)
    for group in progress.bar(analysis.groups, "trying groups"):
        reason = _excluded(group, exclude)
        if reason is None and len(group) < 2:
            reason = "has one channel"
        if reason is None and together is not None:
            reason = _failure(module, [group], inputs)
        if reason is None:
            good.append(group)
            continue
        kept.update({name.rpartition(".")[0]: reason for name, _ in group.producers})
    if not good:
        raise ModelError(
            f"no channel of {type(module).__name__} can be removed: "
            + "; ".join(f"{layer} {reason}" for layer, reason in list(kept.items())[:3])
        )
    return Analysis(tuple(good), kept)


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:10]) + (" ..." if len(names) > 10 else "")


def _excluded(group: Group, patterns: tuple[str, ...]) -> str | None:
    for name, _ in group.producers:
        for pattern in patterns:
            if fnmatch.fnmatch(name.rpartition(".")[0], pattern):
                return f"excluded by {pattern!r}"
    return None


def _failure(module: nn.Module, groups: Sequence[Group], inputs: tuple[Tensor, ...]) -> str | None:
    """Why the module does not run with half of the groups' channels removed, or None when it does.

    An odd number of units goes: what remains is then no multiple of a width that the code may have written.
    """
    trial = copy.deepcopy(module)
    try:
        remove(trial, [(g, np.arange((len(g) // 2) | 1)) for g in groups if len(g) > 1])
        with torch.no_grad():
            trial(*inputs)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"the model's own code does not run with fewer channels ({lines[0][:120]})"
    return None


def _smallest(remaining: Callable[[float], int], budget: float, most: float, total: int, what: str) -> float:
    """The smallest sparsity with which what remains of `total` fits the budget, else ModelError."""
    least = remaining(most)
    if least > budget:
        raise ModelError(
            f"{least:,} {what} remain at max_sparsity {most}, the budget is {int(budget):,} of "
            f"{total:,} {what}; raise the budget or max_sparsity, or lower round_to"
        )
    low, high = 0.0, most
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        if remaining(middle) <= budget:
            high = middle
        else:
            low = middle
    return high


def _sizes(before: nn.Module, after: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[str, str]:
    macs = [counting.count_macs(m, inputs) for m in (before, after)]
    parameters = [counting.count_parameters(m)[0] for m in (before, after)]
    return (
        f"multiply-accumulates {macs[0]:,} -> {macs[1]:,}",
        f"parameters {parameters[0]:,} -> {parameters[1]:,}",
    )


def _removed_notes(groups: Sequence[Group], units: Sequence[np.ndarray], round_to: int) -> list[str]:
    notes = []
    for group, gone in zip(groups, units, strict=True):
        width = group.channels // len(group)
        if len(gone):
            notes.append(f"{group.name}: {group.channels} -> {group.channels - len(gone) * width} channels")
        else:
            notes.append(f"{group.name} not pruned: {group.channels} channels with round_to {round_to}")
    return notes


def example_inputs(candidate: Candidate) -> tuple[Tensor, ...]:
    """Zeros of the candidate's input shapes and dtypes."""
    return tuple(torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in candidate.inputs)
