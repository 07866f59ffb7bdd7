"""Several processes, on one machine or many, train one model: started by `torchrun`, or alone.

Each process takes every k-th sample of each batch, and gradients are summed, so that the updates are those
of one process. `torchrun` sets RANK, WORLD_SIZE and the address; without them all of this does nothing.
Batch normalization sees its own process's part of the batch only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch import distributed as group

from edgecomp.spec import Batch


def start() -> None:
    """Join the group that `torchrun` describes, once; gloo, as work is on CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not group.is_initialized():
        group.init_process_group("gloo")


def size() -> int:
    return group.get_world_size() if group.is_initialized() else 1


def rank() -> int:
    return group.get_rank() if group.is_initialized() else 0


def wait() -> None:
    """Until every process is here."""
    if size() > 1:
        group.barrier()


def share(batch: Batch) -> Batch:
    """This process's samples of a batch; may be empty."""
    if size() == 1:
        return batch
    mine = np.arange(rank(), len(batch), size())
    targets = None if batch.targets is None else batch.targets[mine]
    return Batch(tuple(a[mine] for a in batch.inputs), targets)


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up the gradients of all processes, in place; a missing one counts as zero."""
    if size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        group.all_reduce(parameter.grad)


def gathered(tensor: Tensor) -> list[Tensor]:
    """A tensor of every process, in their order; all have one shape."""
    if size() == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(size())]
    group.all_gather(found, tensor)
    return found


def first_says(value: bool) -> bool:
    """What the first process says, in all of them: for decisions that depend on a clock."""
    return total(float(value and rank() == 0)) > 0


def total(value: float) -> float:
    """The sum of a number over all processes."""
    if size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    group.all_reduce(tensor)
    return float(tensor)
