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
    lost = {name.removesuffix(".weight") for name, axis in kept if name.endswith(".weight") and axis == 1}
    calls = _calls(pruned, lost, last)
    if not batches or not calls:
        return ("recovery: no layer to fit, or fewer than two batches of samples",)
    before = {n: copy.deepcopy(pruned.get_submodule(n).state_dict()) for n in calls}
    wanted = first_output(original, last)
    start = _error(first_output(pruned, last), wanted)
    fitted = 0
    for name, count in progress.bar(list(calls.items()), "fitting what stays"):
        outputs = kept.get((f"{name}.weight", 0))
        fitted += _fit(_Pair(original, pruned, name, count == 1, outputs), batches)
    end = _error(first_output(pruned, last), wanted)
    if not end < start:
        for name, state in before.items():
            pruned.get_submodule(name).load_state_dict(state)
        return (f"recovery left out: relative error {end:.3g} of the outputs after it, {start:.3g} before",)
    return (f"recovery: {fitted} layers fitted; relative error of the outputs {start:.3g} -> {end:.3g}",)


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
    """How often each layer that can be fitted runs in one pass, in the order of first calls."""
    found: dict[str, int] = {}
    hooks = []
    for name in names:
        layer = module.get_submodule(name)
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1):

            def count(*_: Any, key: str = name) -> None:
                found[key] = found.get(key, 0) + 1

            hooks.append(layer.register_forward_hook(count))
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
            columns, outputs = _columns(self.layer, x), _flat(self.layer, y)
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
    """Ridge regression towards the weights as they are; False where samples are too few for the columns."""
    layer = pair.layer
    width = layer.weight[0].numel() + (layer.bias is not None)
    gram = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros(width, len(layer.weight), dtype=torch.float64)
    rows = 0
    for index, inputs in enumerate(batches, start=1):
        for columns, outputs in pair.rows(inputs):
            if layer.bias is not None:
                columns = F.pad(columns, (0, 1), value=1.0)
            gram += (columns.T @ columns).double()
            cross += (columns.T @ outputs).double()
            rows += len(columns)
        if index * _BATCH >= _LEAST_SAMPLES and rows >= _ROWS_PER_COLUMN * width:
            break
    size = gram.diagonal().mean()
    if rows < 2 * width or not torch.isfinite(gram).all() or size == 0:
        return False
    now = layer.weight.reshape(len(layer.weight), -1)
    if layer.bias is not None:
        now = torch.cat([now, layer.bias[:, None]], dim=1)
    ridge = _RIDGE * size * torch.eye(width, dtype=torch.float64)
    fitted = torch.linalg.solve(gram + ridge, cross + ridge @ now.double().T).T.to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias.copy_(fitted[:, -1])
        fitted = fitted[:, :-1]
    layer.weight.copy_(fitted.reshape(layer.weight.shape))
    return True


def _columns(layer: nn.Module, x: Tensor) -> Tensor:
    """[rows, columns]: what one output of the layer is a weighted sum of."""
    if isinstance(layer, nn.Conv2d):
        parts = F.unfold(_padded(layer, x), layer.kernel_size, layer.dilation, 0, layer.stride)
        return parts.transpose(1, 2).flatten(0, 1)
    if isinstance(layer, nn.Conv1d):
        kernel, dilation, stride = layer.kernel_size[0], layer.dilation[0], layer.stride[0]
        padded = _padded(layer, x)[:, :, None]
        parts = F.unfold(padded, (1, kernel), (1, dilation), 0, (1, stride))
        return parts.transpose(1, 2).flatten(0, 1)
    return x.reshape(-1, x.shape[-1])


def _padded(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """`_reversed_padding_repeated_twice` is how PyTorch's own convolutions hold their padding, "same" too."""
    amounts: list[int] = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, amounts, mode=mode)


def _flat(layer: nn.Module, y: Tensor) -> Tensor:
    """[rows, outputs] in the order of `_columns`."""
    if isinstance(layer, nn.Linear):
        return y.reshape(-1, y.shape[-1])
    return y.flatten(2).transpose(1, 2).flatten(0, 1)
