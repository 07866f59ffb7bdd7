"""4-bit weights with 8- and 16-bit activations: QAT of the Fashion-MNIST net, exported to TFLite and ONNX.

    python benchmarks/w4_fashion.py [--epochs 4] [--json PATH]

The demo's float net and its part of Fashion-MNIST (`edgecomp.calibration_data.sample`). Training distils from
the float net (alpha 0.5 with labels). Accuracy is that of the files: LiteRT's XNNPACK kernels, ONNX Runtime
with the graph as written, on all test pictures of the part; the bar is half a point below float.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgecomp import door, registry
from edgecomp.calibration_data import sample
from edgecomp.compress.qat import QuantizeAwareTraining
from edgecomp.demo.model import build
from edgecomp.spec import Candidate, Data, TensorSpec

INPUT = TensorSpec("x", (1, 1, 28, 28), layout="NCHW")


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(1) == labels).mean())


def trained(bits: int, epochs: int, data: Data) -> Candidate:
    step = QuantizeAwareTraining(
        epochs=epochs, learning_rate=1e-3, alpha=0.5, weight_bits=4, activation_bits=bits, rounding="gptq"
    )
    return step(Candidate(build(), (INPUT,)), data)


def rows_of(bits: int, candidate: Candidate, images: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for target in ("tflite-int8" if bits == 8 else "tflite-int16x8", "onnx-qdq"):
            form = registry.format_of(target)
            path = Path(folder) / f"m.{form}"
            registry.load("exporters", target)(target=target).export(candidate, Data(), path)
            session = registry.load("runtimes", form)().open(path, optimize=form == "tflite")
            scores = door.run_float(session, [images])[0]
            found.append(
                {
                    "file": f"W4A{bits} {target}",
                    "size_bytes": path.stat().st_size,
                    "accuracy": accuracy(scores, labels),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--bits", type=int, action="append", choices=(8, 16), help="activations; both")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    test = sample.fashion_test()
    batch = next(iter(test.batches(len(test))))
    images, labels = batch.inputs[0], np.asarray(batch.targets)
    with torch.no_grad():
        real = accuracy(build()(torch.from_numpy(images)).numpy(), labels)
    data = Data(train=sample.fashion_train(), calibration=sample.fashion_calibration())
    print(f"{len(labels)} test pictures, {len(data.train or ())} for training; float {real:.2%}", flush=True)
    print("| file | bytes | accuracy | to float |\n| --- | --- | --- | --- |", flush=True)
    rows = []
    for bits in options.bits or (8, 16):
        start = time.perf_counter()
        candidate = trained(bits, options.epochs, data)
        seconds = time.perf_counter() - start
        for row in rows_of(bits, candidate, images, labels):
            rows.append({**row, "float": real, "training_seconds": seconds})
            change = 100 * (row["accuracy"] - real)
            print(
                f"| {row['file']} | {row['size_bytes']:,} | {row['accuracy']:.2%} | {change:+.2f} points |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
