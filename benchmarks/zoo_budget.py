"""Where a peer's INT8 is better than our defaults: what `quantize-to-budget` chooses to reach the peer.

int8_zoo.py calls it for each model whose file of ours, ONNX or TFLite, lies behind the best peer's of that
format in SQNR or in top-1 agreement. The budget is the peer's result: noise (`min_sqnr_db`) or points of
top-1 (`max_drop`). Operations may stay float in ONNX, as the peers' do; TFLite has none. It calibrates on
the samples of all, is judged on others that neither calibration nor evaluation has, and the file is then
evaluated on the evaluation samples.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zoo

JUDGES = 256
_SQNR_DB = 0.05
"""Less than this is no difference in SQNR."""
_FORMATS = {"onnx": ("onnx-qdq", ".onnx"), "tflite": ("tflite-int8", ".tflite")}


def wanted(files: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each format and figure in which a peer's file is ahead: what ours is to reach."""
    found = []
    for kind, (target, suffix) in _FORMATS.items():
        mine = files.get(f"ours{suffix}", {})
        peers = {n: f for n, f in files.items() if n.endswith(suffix) and n != f"ours{suffix}"}
        for figure, least in (("sqnr_db", _SQNR_DB), ("top1_agreement", 0.0)):
            ranked = sorted((f[figure], name) for name, f in peers.items() if figure in f)
            if figure in mine and ranked and ranked[-1][0] > mine[figure] + least:
                best, name = ranked[-1]
                found.append({"kind": kind, "target": target, "figure": figure, "best": best, "peer": name})
    return found


@dataclass(frozen=True)
class _Rows:
    """A data source over arrays [N, ...]."""

    arrays: tuple[np.ndarray, ...]
    labels: tuple[str, ...] = ()
    preprocessing: None = None

    def __len__(self) -> int:
        return len(self.arrays[0])

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Any]:
        from edgecomp.spec import Batch

        order = np.arange(len(self))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(len(self))
        for start in range(0, len(self), size):
            yield Batch(tuple(a[order[start : start + size]] for a in self.arrays))


def judges(member: zoo.Member, calibration: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Up to `JUDGES` samples of the calibration split that are not among those calibrated on."""
    pool = member.data("calibration", len(calibration[0]) + JUDGES)
    used = {row.tobytes() for row in calibration[0]}
    fresh = [i for i, row in enumerate(pool[0]) if row.tobytes() not in used][:JUDGES]
    return tuple(a[fresh] for a in pool)


def quantize(member: zoo.Member, folder: Path, calibration: tuple[np.ndarray, ...]) -> dict[str, Any]:
    """Every budget of `folder/budgets.json`, one after another; files are `budget-N.onnx` or `.tflite`."""
    from edgecomp import registry
    from edgecomp.spec import Candidate, Data, TensorSpec

    specs = tuple(
        TensorSpec(f"inputs_{i}", a[:1].shape, str(a.dtype), "NCHW" if a.ndim == 4 else "")
        for i, a in enumerate(calibration)
    )
    data = Data(calibration=_Rows(calibration), evaluation=_Rows(judges(member, calibration)))
    rows = json.loads((folder / "budgets.json").read_text())
    for number, row in enumerate(rows):
        noise = row["figure"] == "sqnr_db"
        budget = {"min_sqnr_db": row["best"]} if noise else {"max_drop": 100 * (1 - row["best"])}
        step = registry.load("steps", "quantize-to-budget")(
            **budget,
            samples=len(calibration[0]),
            evaluation_samples=JUDGES,
            allow_float=row["kind"] == "onnx",
        )
        start = time.perf_counter()
        made = step(Candidate(member.build(), specs), data)
        row |= {"seconds": time.perf_counter() - start, "notes": list(made.history[-1].notes)}
        row["kept"] = [a["method"] for a in made.history[-1].settings["attempts"] if a["kept"]]
        row["held"] = " holds" in row["notes"][0]
        row["file"] = f"budget-{number}{_FORMATS[row['kind']][1]}"
        exporter = registry.load("exporters", row["target"])(target=row["target"])
        exporter.export(made, data, folder / row["file"])
    return {"budgets": rows}


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | figure | best peer | ours, defaults | holds | kept, in turn | SQNR dB | top-1 | MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        for row in r.get("budgets", []):
            mine = r["files"][f"ours.{row['kind']}"]
            f = r["files"].get(row["file"], {})
            shown = "{:.2f}" if row["figure"] == "sqnr_db" else "{:.3f}"
            peer = f"{row['peer']}: {shown.format(row['best'])}"
            own = shown.format(mine[row["figure"]])
            top1 = f"{f['top1_agreement']:.3f}" if "top1_agreement" in f else ""
            figures = (
                f"{f['sqnr_db']:.2f} | {top1} | {f['bytes'] / 1e6:.2f}" if "bytes" in f else "failed | |"
            )
            kept = ", then ".join(row["kept"])
            held = "yes" if row["held"] else "no"
            figure = f"{row['kind']}, {row['figure']}"
            cells = (r["model"], figure, peer, own, held, kept, figures)
            lines.append(f"| {' | '.join(cells)} |")
    return lines
