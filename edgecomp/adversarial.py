"""Adversarially small changes: made on the float model, transferred to the artifact."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from edgecomp.errors import DataError
from edgecomp.parity.changed import ChangedSource
from edgecomp.reference import flatten
from edgecomp.spec import Batch, DataSource


class FastGradientSign(ChangedSource):
    """A classifier's data, each first input moved by `epsilon` along the sign of the loss's gradient.

    Goodfellow, Shlens and Szegedy, Explaining and Harnessing Adversarial Examples (2015), sec. 4:
    x + epsilon * sign(grad_x J(x, y)), J the cross-entropy of the float module. `epsilon` is in the unit of
    the normalized input; where the preprocessing is known, results stay in the range of an 8-bit pixel.
    Raises DataError without class targets.
    """

    def __init__(self, source: DataSource, module: nn.Module, epsilon: float) -> None:
        super().__init__(source, self._moved_batch)
        self._module, self._epsilon = module, epsilon

    def _moved_batch(self, batch: Batch, first: int) -> np.ndarray:
        if batch.targets is None or batch.targets.dtype.kind not in "iu":
            raise DataError("adversarial inputs need class targets; the data has none: drop --fgsm")
        return np.concatenate([self._moved(batch, i) for i in range(len(batch))])

    def _moved(self, batch: Batch, i: int) -> np.ndarray:
        tensors = [torch.from_numpy(np.ascontiguousarray(a[i : i + 1])) for a in batch.inputs]
        first = tensors[0].requires_grad_()
        target = torch.tensor([int(batch.targets[i])])  # type: ignore[index]
        with torch.enable_grad():
            scores = flatten(self._module(first, *tensors[1:]))[0]
            loss = nn.functional.cross_entropy(scores, target)
        (gradient,) = torch.autograd.grad(loss, first)
        moved = (first + self._epsilon * gradient.sign()).detach().numpy()
        how = self._source.preprocessing
        if how is not None and how.sample_rate is None:
            moved = np.clip(moved, *how.exact_range())
        return moved.astype(batch.inputs[0].dtype)
