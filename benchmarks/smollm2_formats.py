"""One 4-bit decision in three formats: how often ONNX, TFLite and Core ML name the same next token.

    edgecomp run examples/smollm2.yaml --out build/smollm2
    python benchmarks/smollm2_formats.py build/smollm2 [--rows 16] [--json PATH]

Each artifact runs the example's evaluation rows as it does on a device: ONNX Runtime with int8 activations in
blocks, LiteRT with activations quantized at run time, Core ML's reference executor in float16. `near_ties`:
tokens where the two likeliest of ONNX are less than 0.1 apart, which any rounding may turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from edgecomp import registry

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from smollm2_gguf import evaluation

_FILES = ("onnx-int4.onnx", "tflite-int4.tflite", "coreml-int4.mlpackage")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = list(itertools.islice(evaluation(), arguments.rows))
    said: dict[str, np.ndarray] = {}
    close = np.zeros(0)
    for name in _FILES:
        path = arguments.folder / name
        session = registry.load("runtimes", registry.format_of(path.suffix))().open(path)
        dtype = session.inputs[0].dtype
        logits = [session.run([ids[None].astype(dtype)])[0][0] for ids, _ in rows]
        said[name] = np.concatenate([found.argmax(-1) for found in logits])
        if name.endswith(".onnx"):
            top = np.concatenate([np.sort(found, -1)[:, -2:] for found in logits])
            close = top[:, 1] - top[:, 0] < 0.1
    result: dict[str, float] = {"tokens": float(len(close)), "near_ties": float(close.mean())}
    for one, other in itertools.combinations(_FILES, 2):
        same = said[one] == said[other]
        result[f"{one} = {other}"] = float(same.mean())
        result[f"{one} = {other}, near ties left out"] = float(same[~close].mean())
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
