"""Distil, prune and quantize in a chain, and each alone: bytes, latency and accuracy on Fashion-MNIST.

    python benchmarks/fashion_chain.py [--seeds 0 1 2] [--data FOLDER] [--json PATH] [--epochs 6]

The float model is a residual depthwise-separable CNN of 0.48 M parameters, trained on the whole training set.
Rows, each a TFLite file tested on the 10,000 test pictures through LiteRT:

- float: the float model.
- quantize: post-training INT8 of the float model.
- qat: the float model trained further with fake quantization.
- prune: the float model pruned to 40 % of its multiply-accumulates, trained on labels, float file.
- distil: a narrower student (0.17 M parameters) taught by the float model, float file.
- chain: that student, pruned to half of its multiply-accumulates while the float model teaches, QAT, INT8.

Latency: median of this machine, one thread; each file is measured in turns with the float file (`compare`).
Data: Debian's package `dataset-fashion-mnist`. One seed takes about 25 minutes on one core; every seed trains
everything anew.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp import pipeline_export as exporting
from edgecomp import registry
from edgecomp.compress.distill import Distill
from edgecomp.compress.iterative import PruneIteratively
from edgecomp.compress.macs import count_macs, count_parameters
from edgecomp.compress.prune import PruneChannels
from edgecomp.compress.ptq import Quantize
from edgecomp.compress.qat import QuantizeAwareTraining
from edgecomp.compress.train import Finetune
from edgecomp.demo.train import IdxPictures
from edgecomp.door import run_float
from edgecomp.spec import Candidate, Data, TensorSpec

INPUTS = (TensorSpec("x", (1, 1, 28, 28), layout="NCHW"),)
TEACHER, STUDENT = (32, 48, 128, 256), (24, 40, 80, 152)
DEPTHS = (1, 3, 3)


def separable(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class Block(nn.Module):
    """Two depthwise-separable convolutions, with a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.shortcut = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *separable(inputs, outputs, stride), nn.ReLU(), *separable(outputs, outputs)
        )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.layers(x) if self.shortcut else self.layers(x))


class Net(nn.Module):
    """[N, 1, 28, 28] float32 -> [N, 10] logits."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        stem, *stages = widths
        self.stem = nn.Sequential(nn.Conv2d(1, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        blocks, inputs = [], stem
        for stage, (width, depth) in enumerate(zip(stages, DEPTHS, strict=True)):
            for index in range(depth):
                blocks.append(Block(inputs, width, 2 if stage and not index else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.blocks(self.stem(x))).flatten(1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=6, help="of the float model and of the student")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        raise SystemExit(f"no {arguments.data}: apt-get install dataset-fashion-mnist, or give --data")
    found = []
    for seed in arguments.seeds:
        found.append(measured(seed, arguments.data, arguments.epochs))
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    print(f"mean of {len(found)} seeds:")
    for row in means(found):
        print(told(row), flush=True)


def measured(seed: int, folder: Path, epochs: int) -> dict[str, Any]:
    """Train, export and measure everything with one seed: `rows` by name, and the seconds that it took."""
    started = time.perf_counter()
    train, test = IdxPictures(folder, "train"), IdxPictures(folder, "t10k")
    data = Data(train=train, calibration=train)
    candidates = trained(seed, epochs, data)
    with tempfile.TemporaryDirectory() as place:
        paths = {n: written(c, data, Path(place), n) for n, c in candidates.items()}
        rows = {n: row(n, candidates[n], p, paths["float"], test) for n, p in paths.items()}
    for each in rows.values():
        print(told(each), flush=True)
    return {"seed": seed, "rows": rows, "seconds": time.perf_counter() - started}


def trained(seed: int, epochs: int, data: Data) -> dict[str, Candidate]:
    """Every row's candidate."""
    common: dict[str, Any] = {"batch_size": 128, "validation": 0.0, "seed": seed}
    torch.manual_seed(seed)
    labels = Finetune(
        epochs=epochs, learning_rate=4e-3, weight_decay=0.05, label_smoothing=0.05, flip=True, **common
    )
    floating = labels(Candidate(Net(TEACHER).eval(), INPUTS), data)
    floating = Candidate(floating.module, INPUTS, original=floating.module)
    calibrate = Quantize(samples=256)
    gentle = QuantizeAwareTraining(epochs=1, learning_rate=2e-4, alpha=0.5, **common)
    pruned = PruneChannels(macs=0.4, criterion="taylor", scope="global")(floating, data)
    again = Finetune(epochs=3, learning_rate=2e-3, weight_decay=0.05, label_smoothing=0.05, **common)
    student = Candidate(Net(STUDENT).eval(), INPUTS, original=floating.module)
    teach = Distill(epochs=epochs, learning_rate=4e-3, weight_decay=0.05, alpha=0.9, **common)
    distilled = teach(student, data)
    smaller = PruneIteratively(
        macs=0.5, rounds=1, final_epochs=4, learning_rate=2e-3, weight_decay=0.05, alpha=0.9, **common
    )(distilled, data)
    return {
        "float": floating,
        "quantize": calibrate(floating, data),
        "qat": gentle(floating, data),
        "prune": again(pruned, data),
        "distil": distilled,
        "chain": QuantizeAwareTraining(epochs=2, learning_rate=2e-4, alpha=0.5, **common)(smaller, data),
    }


def written(candidate: Candidate, data: Data, folder: Path, name: str) -> Path:
    target = "tflite-fp32" if candidate.quantization is None else "tflite-int8"
    exporter = exporting.make_exporter(target, {})
    path = folder / name / "model.tflite"
    path.parent.mkdir()
    exporter.export(candidate, data, path)
    return path


def row(name: str, candidate: Candidate, path: Path, floating: Path, test: IdxPictures) -> dict[str, Any]:
    zeros = (torch.zeros(1, 1, 28, 28),)
    facts = {
        "name": name,
        "accuracy": accuracy(path, test),
        "bytes": path.stat().st_size,
        "parameters": count_parameters(candidate.module)[0],
        "macs": count_macs(candidate.module, zeros),
    }
    if path == floating:
        return {**facts, "smaller": 1.0, "faster": 1.0, "float_ms": None, "ms": None}
    device = registry.load("devices", "local")()
    found = registry.load("profiling", "compare")(device, floating, path)
    a, b = (found[side]["latency_ms"]["p50"] for side in ("a", "b"))
    smaller = floating.stat().st_size / facts["bytes"]
    return {**facts, "smaller": smaller, "faster": a / b, "float_ms": a, "ms": b}


def accuracy(path: Path, test: IdxPictures) -> float:
    """Share of the test pictures that the file classifies as labelled, through LiteRT."""
    session = registry.load("runtimes", "tflite")().open(path)
    right = sum(
        int((run_float(session, b.inputs)[0].argmax(1) == b.targets).sum()) for b in test.batches(500)
    )
    return right / len(test)


def means(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    result = []
    for name in found[0]["rows"]:
        rows = [each["rows"][name] for each in found]
        keys = [k for k, v in rows[0].items() if isinstance(v, int | float)]
        result.append({"name": name, **{k: float(np.mean([r[k] for r in rows])) for k in keys}})
    return result


def told(row: Mapping[str, Any]) -> str:
    return (
        f"{row['name']:9} accuracy {row['accuracy']:.4f}  {row['bytes']:>11,.0f} bytes ({row['smaller']:.1f} "
        f"times smaller)  {row['macs'] / 1e6:.2f} M MACs  {row['faster']:.2f} times faster"
    )


if __name__ == "__main__":
    main()
