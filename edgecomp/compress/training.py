"""What every trained step has: settings, the form of a loss, outputs and targets as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecomp.errors import DataError, RecipeError
from edgecomp.spec import Batch


class Objective(Protocol):
    """What training makes small: the mean loss of a batch, a scalar tensor with a gradient."""

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class Training:
    """Settings of the shared loop; every trained step has these fields.

    `learning_rate` rises linearly over `warmup` (a fraction of all updates) and then falls to zero on a
    half cosine (Loshchilov and Hutter 2017, eq. 5, one cycle). `validation` is the fraction of the
    training data held out to choose the best epoch (0: the last epoch is kept). `flip` mirrors pictures
    at random, `shift` moves them by up to that many pixels, both only on [N, C, H, W] inputs. `accumulate`
    batches make one update; `precision` bfloat16 computes the model's forward pass in mixed precision;
    `patience`: stop after that many epochs without a better one on the held-out part.
    """

    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 1e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup: float = 0.05
    label_smoothing: float = 0.0
    validation: float = 0.1
    clip_norm: float | None = None
    flip: bool = False
    shift: int = 0
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check("epochs", self.epochs, self.epochs >= 1, "1 or more")
        check("batch_size", self.batch_size, self.batch_size >= 1, "1 or more")
        check("learning_rate", self.learning_rate, self.learning_rate > 0, "a positive number")
        check("optimizer", self.optimizer, self.optimizer in ("adamw", "sgd"), "adamw or sgd")
        check("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        check("warmup", self.warmup, 0 <= self.warmup < 1, "a fraction from 0 up to, not including, 1")
        check("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "0 to below 1")
        check("validation", self.validation, 0 <= self.validation <= 0.5, "a fraction from 0 to 0.5")
        check("accumulate", self.accumulate, self.accumulate >= 1, "1 or more")
        check("precision", self.precision, self.precision in ("float32", "bfloat16"), "float32 or bfloat16")
        check("patience", self.patience, self.patience is None or self.patience >= 1, "1 or more")
        check("shift", self.shift, self.shift >= 0, "0 or more pixels")


def check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise RecipeError(f"{name} is {value}; expected {expected}")


def first_output(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The model's first output tensor, whether it returns a tensor, a tuple, or a mapping of tensors."""
    result = module(*inputs)
    if isinstance(result, Mapping):
        result = result["logits"] if "logits" in result else next(iter(result.values()))
    return result[0] if isinstance(result, tuple | list) else result


def task_loss(outputs: Tensor, targets: Tensor | None, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of `outputs` [..., classes] with integer targets [...] (-100 is ignored), else MSE."""
    if targets is None:
        raise DataError("training needs targets, and the data source gives none: use a labelled source")
    if targets.is_floating_point():
        return F.mse_loss(outputs, targets.reshape(outputs.shape))
    flat = outputs.reshape(-1, outputs.shape[-1])
    labels = targets.reshape(-1)
    if len(flat) != len(labels) or int(labels.max()) >= flat.shape[1]:
        raise DataError(
            f"targets of shape {tuple(targets.shape)} with largest label {int(labels.max())} do not fit "
            f"outputs of shape {tuple(outputs.shape)}; expected one label below {flat.shape[1]} for each row"
        )
    return F.cross_entropy(flat, labels, label_smoothing=smoothing)


def tensors(batch: Batch) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """A NumPy batch as torch tensors: inputs as they are, targets int64 or float32."""
    inputs = tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in batch.inputs)
    if batch.targets is None:
        return inputs, None
    integer = np.issubdtype(batch.targets.dtype, np.integer)
    targets = torch.from_numpy(np.asarray(batch.targets, dtype=np.int64 if integer else np.float32))
    return inputs, targets
