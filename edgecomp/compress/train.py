"""Fine-tuning, and what turns a loss into a step: a trained copy with its record."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from torch import Tensor, nn

from edgecomp.compress.fit import fit
from edgecomp.compress.training import (
    Objective,
    Training,
    check,
    first_output,
    task_loss,
    tensors,
)
from edgecomp.errors import DataError, ModelError
from edgecomp.spec import Candidate, Data, StepRecord

__all__ = [
    "Finetune",
    "Objective",
    "Training",
    "check",
    "first_output",
    "fit",
    "task_loss",
    "tensors",
    "trained",
]


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
        raise DataError(f"step {name!r} needs training data: give the recipe `data: train:`, or --train")
    module = copy.deepcopy(candidate.module)
    sparse = any(r.name in ("prune-magnitude", "prune-movement") for r in candidate.history)
    objective, beside = make_objective(module)
    masks = _masks(module) if sparse else {}
    notes = fit(module, data.train, settings, objective, masks, beside=beside)
    record = StepRecord(name, "train", asdict(settings), notes)
    return replace(candidate, module=module, history=(*candidate.history, record))


def _masks(module: nn.Module) -> dict[str, Tensor]:
    """Where weights are not zero, for every matrix or kernel that is sparse but not wholly zero."""
    found = {n: (p != 0).float() for n, p in module.named_parameters() if p.ndim > 1}
    return {n: mask for n, mask in found.items() if 0 < float(mask.mean()) < 1}
