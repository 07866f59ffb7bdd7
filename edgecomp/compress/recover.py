"""What removed channels carried, given to the channels that stay: least squares, layer by layer, no labels.

A layer that lost inputs is fitted anew so that its outputs, on the inputs that the pruned model gives it, are
those of the original (He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017,
eq. 5). Layers go in the order in which they run, so a later one also mends what earlier ones left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecomp import progress
from edgecomp.compress import recover_columns as columns_of
from edgecomp.compress.prune_groups import Place
from edgecomp.compress.training import first_output, tensors
from edgecomp.spec import DataSource

_BATCH = 16
_LEAST_SAMPLES = 64
_ROWS_PER_COLUMN = 20
_POSITIONS = 2048
"""Of one sample, at most so many places of a convolution's output are looked at."""
_RIDGE = 1e-2

Inputs = tuple[Tensor, ...]


@torch.no_grad()
def refit(
    original: nn.Module, pruned: nn.Module, kept: Mapping[Place, np.ndarray], source: DataSource, samples: int
) -> tuple[str, ...]:
    """Fit the layers of `pruned` that lost inputs, in place; returns notes.

    `kept`: for every tensor dimension that lost channels the positions that stay (`kept_positions`). The
    weights from before come back when the fitted ones are no better on the last batch, which is kept out of
    the fit.
    """
    *batches, last = _batches(source, samples)
    lost = {n for n, layer in pruned.named_modules() if _lost_inputs(original.get_submodule(n), layer)}
    calls = _calls(pruned, lost, last)
    if not batches or not calls:
        return ("recovery: no layer to fit, or fewer than two batches of samples",)
    before = {n: copy.deepcopy(pruned.get_submodule(n).state_dict()) for n in calls}
    wanted = first_output(original, last)
    start = _error(first_output(pruned, last), wanted)
    fitted = 0
    for name, count in progress.bar(list(calls.items()), "fitting what stays"):
        outputs = columns_of.kept_outputs(pruned.get_submodule(name), name, kept)
        fitted += _fit(_Pair(original, pruned, name, count == 1, outputs), batches)
    end = _error(first_output(pruned, last), wanted)
    if not end < start:
        for name, state in before.items():
            pruned.get_submodule(name).load_state_dict(state)
        return (f"recovery left out: relative error {end:.3g} of the outputs after it, {start:.3g} before",)
    return (f"recovery: {fitted} layers fitted; relative error of the outputs {start:.3g} -> {end:.3g}",)


def _lost_inputs(original: nn.Module, pruned: nn.Module) -> bool:
    """Is a sum of the layer over fewer inputs than before?"""
    if not columns_of.fits(pruned):
        return False
    return columns_of.matrix(pruned).shape[1] < columns_of.matrix(original).shape[1]


def _batches(source: DataSource, samples: int) -> list[Inputs]:
    found: list[Inputs] = []
    seen = 0
    for batch in source.batches(_BATCH):
        found.append(tensors(batch)[0])
        seen += len(batch)
        if seen >= samples:
            break
    return found


def _calls(module: nn.Module, names: set[str], inputs: Inputs) -> dict[str, int]:
    """How often each of these layers runs in one pass, in the order of first calls."""
    found: dict[str, int] = {}
    hooks = []
    for name in names:

        def count(*_: Any, key: str = name) -> None:
            found[key] = found.get(key, 0) + 1

        hooks.append(module.get_submodule(name).register_forward_hook(count))
    try:
        module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _error(outputs: Tensor, wanted: Tensor) -> float:
    return float((outputs - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30))


class _Reached(Exception):
    """The layer has run; the rest of the pass is not needed."""


@dataclass(frozen=True, eq=False)
class _Pair:
    """A layer of the pruned model and its original. `once`: it runs once in a pass."""

    original: nn.Module
    pruned: nn.Module
    name: str
    once: bool
    outputs: np.ndarray | None

    @property
    def layer(self) -> Any:
        return self.pruned.get_submodule(self.name)

    def rows(self, inputs: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs [rows, columns] of the pruned layer, outputs [rows, kept] of the original), a call each."""
        given = self._seen(self.pruned, inputs)
        wanted = self._seen(self.original, inputs)
        for (x, _), (_, y) in zip(given, wanted, strict=True):
            columns, outputs = columns_of.columns(self.layer, x), columns_of.flat(self.layer, y)
            if self.outputs is not None:
                outputs = outputs[:, torch.from_numpy(self.outputs)]
            most = _POSITIONS * len(x)
            if len(columns) > most:
                rows = torch.randperm(len(columns), generator=torch.Generator().manual_seed(0))[:most]
                columns, outputs = columns[rows], outputs[rows]
            yield columns, outputs

    def _seen(self, module: nn.Module, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        seen: list[tuple[Tensor, Tensor]] = []

        def keep(_: nn.Module, given: Inputs, output: Tensor) -> None:
            seen.append((given[0], output))
            if self.once:
                raise _Reached

        hook = module.get_submodule(self.name).register_forward_hook(keep)
        try:
            module(*inputs)
        except _Reached:
            return seen
        finally:
            hook.remove()
        return seen


def _fit(pair: _Pair, batches: list[Inputs]) -> bool:
    """Ridge regression towards the weights as they are; False where samples are too few for the columns.

    The groups of a grouped convolution are fitted each by itself.
    """
    layer = pair.layer
    groups, now = columns_of.groups(layer), columns_of.matrix(layer).double()
    if layer.bias is not None:
        now = torch.cat([now, layer.bias[:, None].double()], dim=1)
    now = now.unflatten(0, (groups, -1)).mT  # [groups, width, outputs of a group]
    width = now.shape[1]
    gram = torch.zeros(groups, width, width, dtype=torch.float64)
    cross = torch.zeros_like(now)
    rows = 0
    for index, inputs in enumerate(batches, start=1):
        for columns, outputs in pair.rows(inputs):
            given = columns.unflatten(1, (groups, -1)).transpose(0, 1)
            if layer.bias is not None:
                given = F.pad(given, (0, 1), value=1.0)
            gram += (given.mT @ given).double()
            cross += (given.mT @ outputs.unflatten(1, (groups, -1)).transpose(0, 1)).double()
            rows += len(columns)
        if index * _BATCH >= _LEAST_SAMPLES and rows >= _ROWS_PER_COLUMN * width:
            break
    size = gram.diagonal(dim1=1, dim2=2).mean(dim=1)
    if rows < 2 * width or not torch.isfinite(gram).all() or bool((size == 0).any()):
        return False
    ridge = _RIDGE * size[:, None, None] * torch.eye(width, dtype=torch.float64)
    fitted = torch.linalg.solve(gram + ridge, cross + ridge @ now).mT.flatten(0, 1).to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias.copy_(fitted[:, -1])
        fitted = fitted[:, :-1]
    columns_of.put(layer, fitted)
    return True
