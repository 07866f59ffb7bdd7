"""Quantization under a budget of accuracy: cheap methods first, what pays is kept, until the budget holds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from edgecomp import decide_bits, progress
from edgecomp import pipeline_steps as stepping
from edgecomp.compress.ptq import Quantize, calibration_source
from edgecomp.compress.qat import QuantizeAwareTraining
from edgecomp.compress.rules import Rule
from edgecomp.decide_judge import Judge, Quality
from edgecomp.errors import RecipeError
from edgecomp.spec import Candidate, Data, StepRecord

_SHARES = (0.5, 0.1)
"""Of the noise, what wider activations (and operations in float) are to leave: a half, then a tenth."""
_CLEARLY_DB = 0.1
"""At an equal drop a method is kept when it gains more than this; less is chance."""


@dataclass(frozen=True)
class QuantizeToBudget:
    """Quantize so that no more than `max_drop` is lost, with the cheapest of these methods that manage it.

    In turn: min-max ranges and nearest rounding; clipped ranges where that pays; bias correction;
    equalization; GPTQ rounding; 16-bit activations where 8 bits cost most; operations in float where
    integers cost most (`allow_float`: ONNX files take them, TFLite's do not); training with fake
    quantization towards the float model (`train_epochs`; 0 leaves it out). Each starts from what was kept
    before it, and is kept itself if it loses less. `max_drop` is in points: hundredths of the task's
    metric where the evaluation data have targets, else of top-1 disagreement with the float model, else
    of noise power over output power. `min_sqnr_db`, in place of `max_drop`: the outputs' noise itself is
    judged, whatever the task, and is to lie that far below them. `size_bytes`: 4-bit weights, where they
    cost least, until all weights fit. Judged on `evaluation_samples` of the evaluation data, or on the
    last quarter of the calibration data, which are then not calibrated on."""

    max_drop: float = 0.5
    min_sqnr_db: float | None = None
    size_bytes: int | None = None
    samples: int = 128
    evaluation_samples: int = 500
    train_epochs: int = 2
    learning_rate: float = 1e-5
    allow_float: bool = False
    exclude: tuple[str, ...] = ()
    rules: Mapping[str, Rule] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop <= 100:
            raise RecipeError(f"max_drop is {self.max_drop}; expected points from 0 to 100, such as 0.5")
        if self.min_sqnr_db is not None and not 0 <= self.min_sqnr_db <= 120:
            raise RecipeError(f"min_sqnr_db is {self.min_sqnr_db}; expected dB from 0 to 120, such as 30")
        if self.size_bytes is not None and self.size_bytes < 1:
            raise RecipeError(f"size_bytes is {self.size_bytes}; expected 1 or more")
        if self.train_epochs < 0 or self.evaluation_samples < 1:
            raise RecipeError("train_epochs must be 0 or more, evaluation_samples 1 or more")
        self._first()

    @property
    def points(self) -> float:
        """What may be lost, in points of what is judged."""
        return self.max_drop if self.min_sqnr_db is None else 100 * 10 ** (-self.min_sqnr_db / 10)

    def _first(self) -> Quantize:
        return Quantize(
            observer="minmax",
            rounding="nearest",
            bias_correction="none",
            samples=self.samples,
            exclude=self.exclude,
            rules=self.rules,
        )

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        """The best candidate found; its record holds `attempts` (see `Attempt`). Raises DataError without
        calibration data, ModelError when the weights cannot fit `size_bytes`."""
        calibration_source(data)
        judge, data = Judge.prepare(
            candidate, data, self.evaluation_samples, of_noise=self.min_sqnr_db is not None
        )
        search = _Search(self, candidate, data, judge)
        search.run()
        found = search.best
        settings = {**asdict(self), "attempts": [asdict(a) for a in search.attempts], "judged_on": judge.said}
        record = StepRecord("quantize-to-budget", "quantize", settings, (*search.notes(), *_floats(found)))
        return replace(found, history=(*candidate.history, record))


def _floats(candidate: Candidate) -> tuple[str, ...]:
    plan = candidate.quantization
    return tuple(f"{name} stays float: {why}" for name, why in (plan.float_nodes if plan else {}).items())


@dataclass(frozen=True)
class Attempt:
    """One method tried. `settings`: what differs from what was kept before it. `gain_db`, `gain_points`:
    against what was kept before; None for the first. `size_bytes`: weights as stored."""

    method: str
    settings: Mapping[str, Any]
    quality: Quality
    gain_db: float | None
    gain_points: float | None
    seconds: float
    size_bytes: int
    kept: bool


@dataclass(frozen=True)
class _Method:
    """A step to try, and what it changes."""

    name: str
    step: Quantize | QuantizeAwareTraining
    settings: Mapping[str, Any]


class _Search:
    """What was kept so far, and what to try next."""

    def __init__(self, budget: QuantizeToBudget, candidate: Candidate, data: Data, judge: Judge) -> None:
        self.budget, self.candidate, self.data, self.judge = budget, candidate, data, judge
        self.attempts: list[Attempt] = []
        self.step = budget._first()
        self.best = candidate
        self.quality: Quality | None = None

    @property
    def holds(self) -> bool:
        return self.quality is not None and self.quality.drop <= self.budget.points

    def run(self) -> None:
        for method in self._methods():
            self._try(method)
            if self.holds:
                return

    def _methods(self) -> Iterator[_Method]:
        """Cheap ones first; each is made from what was kept when its turn comes."""
        if self.budget.size_bytes is not None:
            yield self._four_bits(self.budget.size_bytes)
        else:
            yield _Method("min-max ranges, nearest rounding", self.step, {})
        yield self._change("clipped ranges where that pays", observer="output")
        yield self._change("bias correction", bias_correction="analytic")
        yield self._change("equalization", equalize=0.5)
        yield self._change("GPTQ rounding", rounding="gptq", bias_correction="auto")
        for share in _SHARES:
            wider = self._sixteen_bits(share)
            if wider is not None:
                yield wider
        for share in _SHARES if self.budget.allow_float else ():
            floats = self._floats(share)
            if floats is not None:
                yield floats
        if self.budget.train_epochs:
            yield self._training()

    def _change(self, name: str, **settings: Any) -> _Method:
        return _Method(name, replace(self.step, **settings), settings)

    def _four_bits(self, size_bytes: int) -> _Method:
        rules = decide_bits.fewer_weight_bits(self.candidate, self.data, self.step, size_bytes)
        return self._ruled(f"4-bit weights of {len(rules)} layers, to fit {size_bytes:,} bytes", rules)

    def _target(self, share: float, noise: float) -> float:
        """The noise to aim at: a share of what there is, or of what may be where noise itself is judged."""
        return share * min(noise, self.budget.points / 100 if self.judge.of_noise else noise)

    def _sixteen_bits(self, share: float) -> _Method | None:
        found = decide_bits.measured(self.best, calibration_source(self.data))
        target = self._target(share, decide_bits.activation_noise(found))
        rules = decide_bits.wider_activations(self.best, found, target)
        return self._ruled(f"16-bit activations in {len(rules)} places", rules) if rules else None

    def _floats(self, share: float) -> _Method | None:
        found = decide_bits.measured(self.best, calibration_source(self.data))
        target = self._target(share, sum(s.noise for s in found))
        names = decide_bits.float_operations(self.best, found, target)
        added = tuple(n for n in names if n not in self.step.exclude)
        if not added:
            return None
        exclude = (*self.step.exclude, *added)
        step = replace(self.step, exclude=exclude)
        return _Method(f"{len(added)} operations in float", step, {"exclude": list(exclude)})

    def _ruled(self, name: str, rules: Mapping[str, Rule]) -> _Method:
        step = replace(self.step, rules={**self.step.rules, **rules})
        return _Method(name, step, {"rules": {k: asdict(v) for k, v in rules.items()}})

    def _training(self) -> _Method:
        kept = self.step
        step = QuantizeAwareTraining(
            epochs=self.budget.train_epochs, learning_rate=self.budget.learning_rate, alpha=1.0,
            batch_size=16, validation=0.0, observer=kept.observer, samples=kept.samples,
            rounding=kept.rounding, equalize=kept.equalize, rules=kept.rules, exclude=kept.exclude,
            seed=self.budget.seed,
        )  # fmt: skip
        settings = {"epochs": step.epochs, "learning_rate": step.learning_rate, "alpha": 1.0}
        return _Method("training towards the float model", step, settings)

    def _try(self, method: _Method) -> None:
        progress.note(f"trying {method.name}")
        start = time.perf_counter()
        training = isinstance(method.step, QuantizeAwareTraining)
        data = replace(self.data, train=self.data.train or self.data.calibration) if training else self.data
        made = method.step(self.candidate, data)
        quality = self.judge.quality(made)
        seconds = time.perf_counter() - start
        before, kept = self.quality, self._pays(quality)
        self.attempts.append(
            Attempt(
                method=method.name,
                settings=method.settings,
                quality=quality,
                gain_db=None if before is None else _gain(quality.sqnr_db, before.sqnr_db),
                gain_points=None if before is None else before.drop - quality.drop,
                seconds=seconds,
                size_bytes=int(stepping.count(made)["size_bytes"]),
                kept=kept,
            )
        )
        if kept:
            self.best, self.quality = made, quality
            if isinstance(method.step, Quantize):
                self.step = method.step

    def _pays(self, now: Quality) -> bool:
        before = self.quality
        if before is None or now.drop < before.drop:
            return True
        return now.drop == before.drop and now.sqnr_db > before.sqnr_db + _CLEARLY_DB

    def notes(self) -> tuple[str, ...]:
        """Lines for people: the verdict, then each method."""
        drop = math.nan if self.quality is None else self.quality.drop
        said = "holds" if self.holds else "does not hold"
        limit = self.budget.min_sqnr_db
        asked = f"{self.budget.max_drop:g} points" if limit is None else f"{limit:g} dB"
        reached = f"{drop:.2f} points of {self.judge.unit}" if limit is None else f"{self._sqnr():.2f} dB"
        verdict = f"the budget of {asked} {said}: {reached} on {self.judge.count} samples ({self.judge.said})"
        lines = (
            f"{a.method}: {a.quality.sqnr_db:.2f} dB, drop {a.quality.drop:.2f}, {a.seconds:.1f} s"
            for a in self.attempts
        )
        marks = ("kept" if a.kept else "left out" for a in self.attempts)
        return (verdict, *(f"{line}, {mark}" for line, mark in zip(lines, marks, strict=True)))

    def _sqnr(self) -> float:
        return math.nan if self.quality is None else self.quality.sqnr_db


def _gain(now: float, before: float) -> float:
    return now - before if math.isfinite(now) and math.isfinite(before) else 0.0
