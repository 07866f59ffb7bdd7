"""Forecast against actual: which operations run in integers, told before the export and read after loading.

    python benchmarks/forecast.py [--only NAME ...] [--target T ...] [--json PATH]

Nets of timm with random weights (`benchmarks/coverage.py` lists them and says what to install), for each
target: the forecast is made from the float net without any data; the net is then calibrated on four random
pictures, exported and loaded. The actual placement is LiteRT's operation list and delegate, ONNX Runtime's
optimized graph and profile, and Core ML's MIL program. Operations that the runtime computes inside others are
not judged. Precision and recall of "runs in integers" (Core ML: of "weight is stored compressed") and, for
LiteRT, of "runs in the delegate", are summed over all operations of all nets. The exit code is 1 when one is
below 0.95.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coverage import NETS, built

from edgecomp import forecast as telling
from edgecomp import registry
from edgecomp.compress.ptq import Quantize
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec

TARGETS = ("tflite-int8", "onnx-qdq", "coreml-pal4")
SUFFIX = {"tflite-int8": ".tflite", "onnx-qdq": ".onnx", "coreml-pal4": ".mlpackage"}
NEEDED = 0.95


class Noise:
    """Four random pictures [1, 3, side, side]."""

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __init__(self, side: int) -> None:
        self.side = side

    def __len__(self) -> int:
        return 4

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        for _ in range(len(self)):
            yield Batch((rng.normal(size=(1, 3, self.side, self.side)).astype(np.float32),))


def judged(name: str, targets: list[str], folder: Path) -> dict[str, Any]:
    """One net: for each target what `edgecomp.forecast.against` says, or the error."""
    side, settings = NETS[name]
    torch.manual_seed(0)
    module = built(name, settings)
    candidate = Candidate(module, (TensorSpec("x", (1, 3, side, side), layout="NCHW"),), original=module)
    data = Data(calibration=Noise(side))
    told = {t: telling.forecast(candidate, t) for t in targets}
    quantized = Quantize(samples=4, rounding="nearest")(candidate, data)
    found: dict[str, Any] = {}
    for target in targets:
        path = folder / f"{name}{SUFFIX[target]}"
        start = candidate if target.startswith("coreml") else quantized
        registry.load("exporters", target)(target=target).export(start, data, path)
        session = registry.load("runtimes", registry.format_of(target))().open(path)
        actual = telling.realized(session)
        found[target] = telling.against(told[target], actual)
    return found


def summed(rows: list[dict[str, Any]], target: str, key: str) -> dict[str, Any] | None:
    scores = [r[target][key] for r in rows if target in r and r[target][key]]
    if not scores:
        return None
    total = {k: sum(s[k] for s in scores) for k in ("told", "was", "hits")}
    return {**total, "precision": total["hits"] / total["told"], "recall": total["hits"] / total["was"]}


def misses(rows: list[dict[str, Any]], target: str) -> list[str]:
    """What was told wrongly, most frequent first."""
    counted: Counter[str] = Counter()
    for net in rows:
        for r in net.get(target, {}).get("rows", []):
            if r["actual"] in ("integer", "float") and r["runs"] != r["actual"]:
                counted[f"{r['type']}: told {r['runs']}, is {r['actual']}"] += 1
            elif r["actual"] in ("integer", "float") and r["placed_on"] not in ("", r["actual_on"]):
                counted[f"{r['type']} {r['actual']}: told {r['placed_on']}, is on {r['actual_on']}"] += 1
    return [f"{count} {what}" for what, count in counted.most_common()]


def counted(rows: list[dict[str, Any]], targets: list[str]) -> dict[str, Any]:
    return {
        target: {
            "nets": len(rows),
            "operations": sum(r[target]["operations"] for r in rows),
            "integer": summed(rows, target, "integer"),
            "delegated": summed(rows, target, "delegated"),
            "misses": misses(rows, target),
        }
        for target in targets
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(NETS), metavar="NAME")
    parser.add_argument("--target", nargs="*", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            rows.append({"name": name, **judged(name, options.target, Path(folder))})
            counts = {t: (rows[-1][t]["operations"], rows[-1][t]["differ"]) for t in options.target}
            print(name, counts, file=sys.stderr, flush=True)
            facts = counted(rows, options.target)
            if options.json:
                options.json.write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))
    scores = [s for f in facts.values() for s in (f["integer"], f["delegated"]) if s]
    if any(min(s["precision"], s["recall"]) < NEEDED for s in scores):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
