"""A/A comparisons: how often do the gates blame a model that is exactly as good as its reference?

Both sides are the demo's float model with independent noise on its logits, so neither is better. At the 95 %
level at most about 5 of 100 comparisons may fail a gate. A planted loss in one class, with flat accuracy,
shows that the gates still see what they should.

    python benchmarks/parity_aa.py [--comparisons 100] [--samples 1000]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import numpy as np
import torch

from edgecomp.calibration_data.sample import LABELS, fashion_test
from edgecomp.demo.model import build
from edgecomp.parity import gates, slices
from edgecomp.parity.entry import figures
from edgecomp.parity.observe import Observations, observe
from edgecomp.spec import Batch

GATES = ("metric.delta.high >= 0", "worst_slice.delta.high >= 0", "flips.p_value >= 0.05")
NOISE = 1.0


class Logits:
    """Data whose inputs are logits already: the models to compare only add their noise."""

    labels, preprocessing = LABELS, None

    def __init__(self, logits: np.ndarray, targets: np.ndarray) -> None:
        self.logits, self.targets = logits, targets

    def __len__(self) -> int:
        return len(self.logits)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield Batch((self.logits[start : start + size],), self.targets[start : start + size])


def logits_of_the_demo() -> tuple[np.ndarray, np.ndarray]:
    model, parts, targets = build(), [], []
    with torch.no_grad():
        for batch in fashion_test().batches(200):
            parts.append(model(torch.from_numpy(batch.inputs[0])).numpy())
            targets.append(batch.targets)
    return np.concatenate(parts), np.concatenate(targets)


def judged(seen: Observations) -> dict[str, bool]:
    facts = figures(seen, "test")
    facts |= slices.slice_figures(seen, "test", ["class"], LABELS)
    facts["intervals"]["worst_slice.delta"] = slices.family_ends(facts["slices"])
    return {g: gates.parse(g).check(facts)["passed"] for g in GATES}


def compared(source: Logits, seed: int, harmed: int | None) -> dict[str, bool]:
    rng = np.random.default_rng(seed)

    def noisy(arrays: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        return [arrays[0] + rng.normal(scale=NOISE, size=arrays[0].shape).astype(np.float32)]

    def unfair(arrays: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        scores = noisy(arrays)[0]
        scores[:, harmed] -= 1.5
        return [scores]

    return judged(observe(noisy, {"test": noisy if harmed is None else unfair}, source, batch_size=500))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparisons", type=int, default=100)
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    logits, targets = logits_of_the_demo()
    failures = dict.fromkeys(GATES, 0)
    for i in range(options.comparisons):
        rows = np.random.default_rng(1000 + i).choice(len(logits), options.samples, replace=False)
        for gate, passed in compared(Logits(logits[rows], targets[rows]), i, None).items():
            failures[gate] += not passed
    planted = compared(Logits(logits, targets), 0, harmed=6)
    print(
        json.dumps(
            {
                "comparisons": options.comparisons,
                "samples": options.samples,
                "failed_without_cause": failures,
                "planted_loss_in_one_class_seen_by": [g for g, passed in planted.items() if not passed],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
