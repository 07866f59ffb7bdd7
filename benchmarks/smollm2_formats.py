"""One 4-bit decision in three formats: how often ONNX, TFLite and Core ML name the same next token.

    python benchmarks/smollm2_model.py --texts FOLDER --out build/smollm2      # the float reference
    python benchmarks/smollm2_formats.py --texts FOLDER --model build/smollm2 --work build/formats

Symmetric groups of 32 without -8, embedding and head in 4 bits, decided once by GPTQ; the checkpoint is kept
in `--work`. Rows of 128 tokens of the evaluation part of each text go through every artifact. `float
activations`: ONNX at accuracy_level 1, TFLite with `activations: float`, Core ML's reference executor in
float16. `int8 activations`: ONNX at accuracy_level 4 and TFLite with activations rounded at run time; Core
ML has none and stays float16. `restored` is the torch decoder with the same weights. `near_ties`: tokens
whose two likeliest next ones are less than 0.1 apart in the restored decoder, which any rounding may turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import smollm2
import smollm2_model
import torch
from transformers import LlamaForCausalLM

from edgecomp import checkpoint, registry
from edgecomp.graph import capture
from edgecomp.language import weights
from edgecomp.language.decoder import from_transformers
from edgecomp.numerics.metrics import sqnr_db
from edgecomp.spec import Candidate, Data, QuantizationPlan, TensorSpec

LENGTH = 128
_TIE = 0.1
ARTIFACTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ONNX": ("onnx-int4", "float.onnx", {"accuracy_level": 1}),
    "TFLite": ("tflite-int4", "float.tflite", {"activations": "float"}),
    "Core ML": ("coreml-int4", "float.mlpackage", {}),
    "ONNX int8": ("onnx-int4", "int8.onnx", {"accuracy_level": 4}),
    "TFLite int8": ("tflite-int4", "int8.tflite", {"activations": "int8"}),
}
SETS = {
    "float activations": ("ONNX", "TFLite", "Core ML"),
    "int8 activations": ("ONNX int8", "TFLite int8", "Core ML"),
}


def decided(arguments: argparse.Namespace, calibration: np.ndarray) -> Candidate:
    """The quantized candidate, from the work folder where it is there already."""
    path = arguments.work / f"{arguments.method}.pt"
    if not path.is_file():
        decoder = from_transformers(LlamaForCausalLM.from_pretrained(arguments.model))
        made = smollm2.ours(decoder, calibration, method=arguments.method, group_size=32, narrow=True)
        checkpoint.save(made, checkpoint.Origin("examples/smollm2_gguf.py:make"), path)
    found = weights.of(checkpoint.load(path)[0])
    inputs = (TensorSpec("ids", (1, LENGTH), "int64"),)
    graph = capture(found.decoder, (torch.zeros(1, LENGTH, dtype=torch.int64),))
    return Candidate(graph, inputs, QuantizationPlan({}, found.plan), original=found.decoder)


def logits_of(candidate: Candidate, name: str, rows: np.ndarray, folder: Path) -> tuple[np.ndarray, int]:
    """[rows * LENGTH, vocabulary] of an artifact, and its bytes; it is written where it is not there yet."""
    target, file, settings = ARTIFACTS[name]
    path = folder / file
    if not path.exists():
        exporter = registry.load("exporters", target)(target=target, **settings)
        exporter.export(candidate, Data(), path)
    session = registry.load("runtimes", registry.format_of(path.suffix))().open(path)
    dtype = session.inputs[0].dtype
    found = [session.run([ids[None].astype(dtype)])[0][0].astype(np.float32) for ids in rows]
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return np.concatenate(found), sum(p.stat().st_size for p in files)


@torch.no_grad()
def reference_of(candidate: Candidate, rows: np.ndarray) -> np.ndarray:
    restored = weights.of(candidate).restored()
    return np.concatenate([restored(torch.from_numpy(ids)[None])[0].numpy() for ids in rows])


def compare(said: dict[str, np.ndarray], close: np.ndarray) -> dict[str, Any]:
    """Agreement of every pair of a set, with and without near ties."""
    result: dict[str, Any] = {}
    for name, members in SETS.items():
        usable = [m for m in ("restored", *members) if m in said]
        result[name] = {
            f"{one} = {other}": {
                "all": float((said[one] == said[other]).mean()),
                "near ties left out": float((said[one] == said[other])[~close].mean()),
            }
            for one, other in itertools.combinations(usable, 2)
        }
    return result


def main() -> None:
    parser = smollm2_model.parser(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--calibration", type=int, default=16, help="Rows of 256 tokens.")
    parser.add_argument("--rows", type=int, default=8, help="Rows of 128 tokens to evaluate on.")
    parser.add_argument("--names", nargs="*", default=list(ARTIFACTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    train, evaluation = smollm2_model.streams(arguments.model, arguments.texts)
    candidate = decided(arguments, smollm2.rows_of(train, 2 * (arguments.calibration // 2)))
    rows = smollm2.rows_of(list(evaluation.values()), 2 * max(arguments.rows // 2, 1))[:, :LENGTH]
    reference = reference_of(candidate, rows)
    top = np.sort(reference, -1)[:, -2:]
    close = top[:, 1] - top[:, 0] < _TIE
    said = {"restored": reference.argmax(-1)}
    result: dict[str, Any] = {"tokens": len(close), "near_ties": float(close.mean()), "artifacts": {}}
    for name in arguments.names:
        found, size = logits_of(candidate, name, rows, arguments.work)
        said[name] = found.argmax(-1)
        result["artifacts"][name] = {"bytes": size, "sqnr_db": float(sqnr_db(reference, found))}
        print(name, result["artifacts"][name], float((said[name] == said["restored"]).mean()), flush=True)
        result["agreement"] = compare(said, close)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
