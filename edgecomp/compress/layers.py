"""Dropping whole layers: the blocks of a stack whose absence changes the outputs least."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgecomp import progress
from edgecomp.compress.train import check, first_output, task_loss, tensors
from edgecomp.errors import DataError, ModelError, RecipeError
from edgecomp.spec import Candidate, Data, DataSource, StepRecord


@dataclass(frozen=True)
class DropLayers:
    """Remove `count` blocks of a stack (an `nn.Sequential` or `nn.ModuleList`), one after another.

    `stack`: its dotted name; without it the longest stack of blocks of one class. `keep`: numbers of blocks
    that stay. Each round skips every block in turn on `samples` samples and removes the one with the lowest
    score: with criterion output the relative squared change of the model's output, with loss the rise of the
    task's loss (needs labels). Blocks that cannot be skipped, as they change the shape, stay.
    """

    count: int = 1
    stack: str | None = None
    criterion: Literal["output", "loss"] = "output"
    keep: tuple[int, ...] = ()
    samples: int = 64

    def __post_init__(self) -> None:
        check("count", self.count, self.count >= 1, "1 or more")
        check("criterion", self.criterion, self.criterion in ("output", "loss"), "output or loss")
        check("samples", self.samples, self.samples >= 1, "1 or more")

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        """Raises ModelError without such a stack, DataError without data."""
        if candidate.quantization is not None:
            raise ModelError("drop-layers comes after quantize, whose graph is fixed; put it before quantize")
        source = data.calibration or data.train
        if source is None:
            raise DataError("drop-layers needs calibration or training data to score the blocks")
        module = copy.deepcopy(candidate.module).eval()
        name = self.stack if self.stack is not None else longest_stack(module)
        left = list(range(len(stack_of(module, name))))
        batches = _batches(source, self.samples)
        removed, notes = [], []
        for _ in range(self.count):
            scores = self._scores(module, name, left, batches)
            if not scores:
                raise ModelError(f"no further block of {name!r} can be dropped; {len(left)} are left")
            index = min(scores, key=lambda i: scores[i])
            notes.append(f"{name}.{left[index]} removed: {self.criterion} changes by {scores[index]:.4g}")
            removed.append(f"{name}.{left[index]}")
            drop(module, name, [index])
            del left[index]
        record = StepRecord("drop-layers", "prune", {**asdict(self), "removed": removed}, tuple(notes))
        original = candidate.original if candidate.original is not None else candidate.module
        return replace(candidate, module=module, history=(*candidate.history, record), original=original)

    @torch.no_grad()
    def _scores(
        self, module: nn.Module, name: str, left: Sequence[int], batches: list[tuple[Any, Any]]
    ) -> dict[int, float]:
        stack = stack_of(module, name)
        before = [first_output(module, inputs) for inputs, _ in batches]
        found = {}
        for index in progress.bar(range(len(left)), "skipping blocks"):
            if left[index] in self.keep:
                continue
            block = stack[index]
            stack[index] = _Skip(block)
            try:
                found[index] = self._score(module, before, batches)
            except (RuntimeError, ValueError, IndexError):
                pass  # the block changes the shape: it stays
            finally:
                stack[index] = block
        return found

    def _score(self, module: nn.Module, before: list[Tensor], batches: list[tuple[Any, Any]]) -> float:
        total = 0.0
        for old, (inputs, targets) in zip(before, batches, strict=True):
            new = first_output(module, inputs)
            if self.criterion == "loss":
                total += float(task_loss(new, targets) - task_loss(old, targets))
            else:
                total += float(((new - old) ** 2).sum() / (old**2).sum().clamp_min(1e-12))
        return total / len(batches)


class _Skip(nn.Module):
    """Passes its first argument on, in the form in which the block would answer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block: tuple[nn.Module, ...] = (block,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Any:
        answer = self._block[0](x, *arguments, **keywords)
        if isinstance(answer, tuple):
            return (_alike(x, answer[0]), *answer[1:])
        return _alike(x, answer)


def _alike(x: Tensor, answer: Tensor) -> Tensor:
    if x.shape != answer.shape:
        raise ValueError("the block changes the shape")
    return x


def stack_of(module: nn.Module, name: str) -> Any:
    """The Sequential or ModuleList of that name. Raises RecipeError."""
    try:
        found = module.get_submodule(name)
    except AttributeError as error:
        raise RecipeError(f"stack {name!r} is no part of the model; stacks are {_names(module)}") from error
    if not isinstance(found, nn.Sequential | nn.ModuleList):
        raise RecipeError(f"stack {name!r} is a {type(found).__name__}; stacks are {_names(module)}")
    return found


def longest_stack(module: nn.Module) -> str:
    """The stack with the most blocks of one class. Raises ModelError."""
    stacks = {
        name: len(stack)
        for name, stack in module.named_modules()
        if isinstance(stack, nn.Sequential | nn.ModuleList)
        and len(stack) > 1
        and len(set(map(type, stack))) == 1
    }
    if not stacks:
        raise ModelError(f"{type(module).__name__} has no stack of equal blocks; name one with stack")
    return max(stacks, key=lambda n: stacks[n])


def _names(module: nn.Module) -> str:
    found = [n for n, m in module.named_modules() if n and isinstance(m, nn.Sequential | nn.ModuleList)]
    return ", ".join(found[:10]) or "none"


def drop(module: nn.Module, stack: str, indices: Sequence[int]) -> None:
    """Take blocks out of a stack, in place; the others move up."""
    owner, _, leaf = stack.rpartition(".")
    old = stack_of(module, stack)
    kept = [block for i, block in enumerate(old) if i not in set(indices)]
    make: Callable[..., nn.Module] = nn.ModuleList if isinstance(old, nn.ModuleList) else nn.Sequential
    fresh = make(kept) if make is nn.ModuleList else make(*kept)
    setattr(module.get_submodule(owner), leaf, fresh)


def drop_recorded(module: nn.Module, record: StepRecord) -> None:
    """Repeat on a fresh model what a `drop-layers` record removed (names count as before the step)."""
    by_stack: dict[str, list[int]] = {}
    for name in record.settings["removed"]:
        stack, _, index = name.rpartition(".")
        by_stack.setdefault(stack, []).append(int(index))
    for stack, indices in by_stack.items():
        drop(module, stack, indices)


def _batches(source: DataSource, samples: int) -> list[tuple[Any, Any]]:
    found, seen = [], 0
    for batch in source.batches(16):
        found.append(tensors(batch))
        seen += len(batch)
        if seen >= samples:
            break
    if not found:
        raise DataError("the data that blocks are scored on is empty")
    return found
