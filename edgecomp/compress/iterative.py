"""Pruning in rounds: score, remove, fine-tune, and again, as one step of a recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from edgecomp import progress
from edgecomp.compress import macs as counting
from edgecomp.compress.distill import Distill
from edgecomp.compress.prune import example_inputs, to_macs
from edgecomp.compress.prune_scores import CRITERIA, Criterion
from edgecomp.compress.train import Finetune, Training, check
from edgecomp.errors import RecipeError
from edgecomp.spec import Candidate, Data, StepRecord

Schedule = Literal["linear", "cubic"]


@dataclass(frozen=True)
class PruneIteratively(Training):
    """Remove channels in `rounds`, training `epochs` after each; the last round trains `final_epochs`.

    `macs`: what may remain in the end, as a fraction of the multiply-accumulates. `schedule` says how much is
    gone after round t of n: linear t/n, cubic 1 - (1 - t/n)^3 (Zhu and Gupta 2017, eq. 1), which takes most
    in the first rounds. Scores are computed afresh in each round. With `distil` the float original teaches
    (`temperature`, `alpha`), else labels do. The other fields are those of `prune` and `finetune`.
    """

    macs: float = 0.5
    rounds: int = 3
    schedule: Schedule = "cubic"
    final_epochs: int = 5
    criterion: Criterion = "taylor"
    scope: Literal["group", "global"] = "global"
    round_to: int = 8
    max_sparsity: float = 0.9
    exclude: tuple[str, ...] = ()
    distil: bool = True
    temperature: float = 4.0
    alpha: float = 0.7
    epochs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check("macs", self.macs, 0 < self.macs < 1, "the fraction that remains, between 0 and 1")
        check("rounds", self.rounds, self.rounds >= 1, "1 or more")
        check("schedule", self.schedule, self.schedule in ("linear", "cubic"), "linear or cubic")
        check("final_epochs", self.final_epochs, self.final_epochs >= 1, "1 or more")
        if self.criterion not in CRITERIA:
            raise RecipeError(f"criterion is {self.criterion!r}; expected one of {', '.join(CRITERIA)}")

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        """One record in the history; the notes tell each round. Raises as `prune` and `finetune` do."""
        inputs = example_inputs(candidate)
        total = counting.count_macs(candidate.module, inputs)
        current, notes = candidate, []
        for number, remaining in enumerate(targets(self.macs, self.rounds, self.schedule), start=1):
            progress.note(f"round {number} of {self.rounds}: {remaining:.0%} of the multiply-accumulates")
            if remaining * total < counting.count_macs(current.module, inputs):
                current = to_macs(self, remaining * total)(current, data)
            current = self._train(self.final_epochs if number == self.rounds else self.epochs)(current, data)
            left = counting.count_macs(current.module, inputs)
            notes.append(
                f"round {number}: {left:,} of {total:,} multiply-accumulates; {current.history[-1].notes[0]}"
            )
        last = [r for r in current.history if r.name == "prune"][-1:]
        notes += [n for r in last for n in r.notes if "not pruned" in n]
        record = StepRecord("prune-iterative", "prune", asdict(self), tuple(notes))
        return replace(current, history=(*candidate.history, record))

    def _train(self, epochs: int) -> Any:
        shared = {f.name: getattr(self, f.name) for f in fields(Training)} | {"epochs": epochs}
        if self.distil:
            return Distill(**shared, temperature=self.temperature, alpha=self.alpha)
        return Finetune(**shared)


def targets(macs: float, rounds: int, schedule: Schedule) -> list[float]:
    """The fraction of multiply-accumulates that remains after each round; the last is `macs`."""
    shares = [t / rounds for t in range(1, rounds + 1)]
    gone = shares if schedule == "linear" else [1 - (1 - s) ** 3 for s in shares]
    return [1 - (1 - macs) * g for g in gone]
