"""Training: the loop that fine-tuning, distillation and quantization-aware training share."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecomp import progress
from edgecomp.errors import DataError, ModelError, RecipeError
from edgecomp.spec import Batch, Candidate, Data, DataSource, StepRecord


class Objective(Protocol):
    """What training makes small: the mean loss of a batch, a scalar tensor with a gradient."""

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class Training:
    """Settings of the shared loop; every trained step has these fields.

    `learning_rate` rises linearly over `warmup` (a fraction of all updates) and then falls to zero on a
    half cosine (Loshchilov and Hutter 2017, eq. 5, one cycle). `validation` is the fraction of the
    training data held out to choose the best epoch (0: the last epoch is kept). `flip` mirrors pictures
    at random, `shift` moves them by up to that many pixels, both only on [N, C, H, W] inputs.
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
        check("shift", self.shift, self.shift >= 0, "0 or more pixels")


def check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise RecipeError(f"{name} is {value}; expected {expected}")


@dataclass(frozen=True)
class Finetune(Training):
    """Train on labels: cross-entropy for integer targets, mean squared error for real ones.

    Needs `train` data with targets. Returns a new candidate in eval mode. Raises DataError without
    targets, ModelError when the loss stops being finite or the candidate is already quantized.
    """

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        def objective(module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
            return task_loss(first_output(module, inputs), targets, self.label_smoothing)

        return trained(candidate, data, self, lambda module: (objective, None), "finetune")


def trained(
    candidate: Candidate,
    data: Data,
    settings: Training,
    make_objective: Callable[[nn.Module], tuple[Objective, nn.Module | None]],
    name: str,
) -> Candidate:
    """A candidate whose module is a trained copy; the step's best epoch stands in the notes.

    `make_objective` takes that copy and gives the loss, and a module of further parameters to train or None.
    """
    if candidate.quantization is not None:
        raise ModelError(
            f"step {name!r} comes after quantize, whose weights are fixed; put it before quantize"
        )
    if data.train is None:
        raise DataError(f"step {name!r} needs training data: give the recipe `data: train:`, or --data")
    module = copy.deepcopy(candidate.module)
    sparse = any(r.name in ("prune-magnitude", "prune-movement") for r in candidate.history)
    objective, beside = make_objective(module)
    masks = _masks(module) if sparse else {}
    notes = fit(module, data.train, settings, objective, masks, beside=beside)
    record = StepRecord(name, "train", asdict(settings), notes)
    return replace(candidate, module=module, history=(*candidate.history, record))


def fit(
    module: nn.Module,
    source: DataSource,
    settings: Training,
    objective: Objective,
    masks: Mapping[str, Tensor] | None = None,
    after_update: Callable[[], None] | None = None,
    beside: nn.Module | None = None,
) -> tuple[str, ...]:
    """Train `module` in place, leave it in eval mode with the best epoch's weights, and say what was done.

    `masks`: parameter name -> 0/1 tensor; weights at 0 stay zero (pruned ones). `after_update`: called after
    every update, gradients still there. `beside`: trained with the module, and then left. Seeded: the same
    module, data, settings and thread count give the same weights.
    """
    held_out, rest = _sizes(source, settings)
    optimizer = _optimizer(module, settings, beside)
    updates = settings.epochs * max(1, math.ceil(rest / settings.batch_size))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i, updates, settings.warmup))
    best: tuple[float, float] | None = None
    best_epoch, weights = settings.epochs, {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        _to_channels_last(module)
        optimizer.register_step_post_hook(lambda *_: _apply_masks(module, masks or {}))
        if after_update is not None:
            optimizer.register_step_post_hook(lambda *_: after_update())
        for epoch in range(1, settings.epochs + 1):
            module.train()
            loss = _epoch(module, source, settings, objective, optimizer, schedule, epoch)
            module.eval()
            line = f"epoch {epoch}/{settings.epochs}: training loss {loss:.4f}"
            if held_out:
                score = _validate(module, source, settings, objective)
                line += f", held-out {_describe(score)}"
                if best is None or score < best:
                    best, best_epoch = score, epoch
                    weights = {k: v.clone() for k, v in module.state_dict().items()}
            progress.note(line)
    if weights:
        module.load_state_dict(weights)
    whole: Any = module
    whole.to(memory_format=torch.contiguous_format)
    module.eval()
    if best is None:
        return (f"last of {settings.epochs} epochs kept, training loss {loss:.4f}",)
    return (
        f"epoch {best_epoch} of {settings.epochs} kept: {_describe(best)} on {held_out} held-out samples",
    )


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


def _sizes(source: DataSource, settings: Training) -> tuple[int, int]:
    if len(source) == 0:
        raise DataError("the training data is empty: expected at least one sample")
    held_out = sum(len(b) for b in _part(source, settings, held_out=True)) if settings.validation else 0
    return held_out, len(source) - held_out


def _part(
    source: DataSource, settings: Training, *, held_out: bool, shuffle_seed: int | None = None
) -> Iterator[Batch]:
    """The held-out part or the rest. A sample's own bytes decide, so order and duplicates do not matter."""
    for batch in source.batches(settings.batch_size, shuffle_seed=shuffle_seed):
        if settings.validation == 0:
            yield batch
            continue
        marks = [zlib.crc32(np.ascontiguousarray(row).tobytes()) % 10_000 for row in batch.inputs[0]]
        chosen = (np.array(marks) < settings.validation * 10_000) == held_out
        if chosen.any():
            targets = None if batch.targets is None else batch.targets[chosen]
            yield Batch(tuple(a[chosen] for a in batch.inputs), targets)


def _optimizer(
    module: nn.Module, settings: Training, beside: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels only; biases, norms and other vectors are left free."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    if trainable and beside is not None:
        trainable += list(beside.parameters())
    if not trainable:
        raise ModelError("the model has no trainable parameter; expected at least one with requires_grad")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=True)
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def _masks(module: nn.Module) -> dict[str, Tensor]:
    """Where weights are not zero, for every matrix or kernel that is sparse but not wholly zero."""
    found = {n: (p != 0).float() for n, p in module.named_parameters() if p.ndim > 1}
    return {n: mask for n, mask in found.items() if 0 < float(mask.mean()) < 1}


@torch.no_grad()
def _apply_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        module.get_parameter(name).mul_(mask)


def _rate(update: int, updates: int, warmup: float) -> float:
    """Factor on the learning rate at this update, from 0 to 1."""
    rising = warmup * updates
    if update < rising:
        return (update + 1) / (rising + 1)
    done = min(1.0, (update - rising) / max(1.0, updates - rising))
    return 0.5 * (1 + math.cos(math.pi * done))


def _epoch(
    module: nn.Module,
    source: DataSource,
    settings: Training,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    epoch: int,
) -> float:
    """One pass over the training part; returns the mean loss."""
    total, count = 0.0, 0
    batches = _part(source, settings, held_out=False, shuffle_seed=settings.seed + epoch)
    steps = math.ceil(len(source) / settings.batch_size)
    for batch in progress.bar(batches, f"epoch {epoch}/{settings.epochs}", steps):
        if len(batch) == 1 and count:
            continue  # batch normalization cannot train on one sample
        inputs, targets = tensors(batch)
        loss = objective(module, _augmented(inputs, settings), targets)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(
                f"the training loss became {value} in epoch {epoch}; "
                f"lower learning_rate (now {settings.learning_rate}) or set clip_norm: 1.0"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), settings.clip_norm)
        optimizer.step()
        schedule.step()
        total, count = total + value * len(batch), count + len(batch)
    if count == 0:
        raise DataError("no sample is left to train on after holding out the validation part; give more data")
    return total / count


def _augmented(inputs: tuple[Tensor, ...], settings: Training) -> tuple[Tensor, ...]:
    if not (settings.flip or settings.shift) or inputs[0].ndim != 4:
        return inputs
    pictures = inputs[0]
    if settings.flip:
        mirrored = torch.rand(len(pictures)) < 0.5
        pictures = torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)
    if settings.shift:
        pictures = _shifted(pictures, settings.shift)
    return (pictures, *inputs[1:])


def _shifted(pictures: Tensor, most: int) -> Tensor:
    """Each picture moved by its own offset of up to `most` pixels; the border is repeated."""
    n, _, height, width = pictures.shape
    padded = F.pad(pictures, (most,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * most + 1, (2, n))
    rows = down[:, None] + torch.arange(height)
    columns = right[:, None] + torch.arange(width)
    sample = torch.arange(n)[:, None, None]
    picked = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def _validate(
    module: nn.Module, source: DataSource, settings: Training, objective: Objective
) -> tuple[float, float]:
    """(error rate, loss) on the held-out part; the error rate is 0 where targets are not classes."""
    wrong, loss, count = 0, 0.0, 0
    for batch in _part(source, settings, held_out=True):
        inputs, targets = tensors(batch)
        loss += float(objective(module, inputs, targets)) * len(batch)
        count += len(batch)
        if targets is not None and not targets.is_floating_point() and targets.ndim == 1:
            wrong += int((first_output(module, inputs).argmax(-1) != targets).sum())
    return wrong / count, loss / count


def _describe(score: tuple[float, float]) -> str:
    return f"loss {score[1]:.4f}" + (f", accuracy {1 - score[0]:.4f}" if score[0] else "")


def _to_channels_last(module: Any) -> None:
    """Channels-last kernels train about 1.7 times faster on CPU (measured on the demo model)."""
    if any(isinstance(m, nn.Conv2d) for m in module.modules()):
        module.to(memory_format=torch.channels_last)
