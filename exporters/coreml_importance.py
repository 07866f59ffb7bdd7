"""How much each weight matters to the output: the diagonal of the Gauss-Newton matrix.

With random v ~ N(0, I), E[(d <v, output> / d w)^2] is the diagonal of J^T J (Hutchinson's estimator; Bekas,
Kokiopoulou and Saad, "An estimator for the diagonal of a matrix", 2007), which is the Fisher information for
a Gaussian likelihood. Weighting k-means by it is SqueezeLLM's sensitivity (Kim et al., arXiv:2306.07629,
equation 4). No labels are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp.exporters.coreml_weights import Weight

_SMOOTHING = 0.03
"""Share of the channel's mean that every weight gets, against few samples."""


@dataclass(frozen=True, eq=False)
class Importance:
    """`values` and `tensors` by parameter name: the diagonal, and the weights it was taken at."""

    values: Mapping[str, np.ndarray]
    tensors: Mapping[str, np.ndarray]

    def of(self, weight: Weight) -> np.ndarray | None:
        """Importance of a converted weight, its shape; None for an embedding or an unknown weight.

        A weight w' = s w into which coremltools folded a scale s per output channel is found by its values,
        and has the importance of w divided by s^2. Rows of an embedding that no sample used look unimportant,
        so that embeddings have none.
        """
        if "gather" in weight.layers:
            return None
        named = [weight.module] if weight.module in self.values else list(self.values)
        for name in named:
            scale = _channel_scale(weight, self.tensors[name])
            if scale is not None:
                return _smoothed(self.values[name] / np.square(scale), weight.axis)
        return None


def _channel_scale(weight: Weight, original: np.ndarray) -> np.ndarray | None:
    """s of w' = s w for every output channel, to broadcast; None when w' is something else."""
    if original.shape != weight.array.shape:
        return None
    others = tuple(a for a in range(original.ndim) if a != weight.axis)
    array = weight.array.astype(np.float32)
    power = np.square(original).sum(others, keepdims=True)
    scale = (array * original).sum(others, keepdims=True) / np.maximum(power, 1e-30)
    if np.linalg.norm(array - scale * original) > 0.01 * np.linalg.norm(array):
        return None
    return np.where(np.abs(scale) > 1e-12, scale, 1.0)


def _smoothed(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean 1, and no weight below a share of its channel's mean."""
    others = tuple(a for a in range(values.ndim) if a != axis)
    values = values.astype(np.float64) / max(float(values.mean()), 1e-300)
    return values + _SMOOTHING * values.mean(others, keepdims=True) + 1e-9


def measure(module: nn.Module, samples: Sequence[tuple[Tensor, ...]], least: int) -> Importance | None:
    """Importance of every tensor of at least `least` elements, over samples of batch 1.

    None when the output does not depend on a weight through differentiable operations. One thread, so that
    the same samples give the same bits.
    """
    tensors = {
        n: t for n, t in _named(module) if t.is_floating_point() and t.numel() >= least and t.dim() > 1
    }
    sums = {n: torch.zeros_like(t) for n, t in tensors.items()}
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        for sample in samples:
            gradients = _gradients(module, sample, list(tensors.values()), generator)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.square()
    except RuntimeError:
        return None
    finally:
        torch.set_num_threads(threads)
        for tensor in tensors.values():
            tensor.requires_grad_(False)
    used = {n: s.numpy() for n, s in sums.items() if bool(s.any())}
    return Importance(used, {n: tensors[n].detach().numpy() for n in used})


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _gradients(
    module: nn.Module, sample: tuple[Tensor, ...], tensors: list[Tensor], generator: torch.Generator
) -> tuple[Any, ...]:
    result = module(*sample)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    scalars = [
        (o * torch.randn(o.shape, generator=generator)).sum() for o in outputs if o.is_floating_point()
    ]
    return torch.autograd.grad(torch.stack(scalars).sum(), tensors, allow_unused=True)
