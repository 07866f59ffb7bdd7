"""Caches of few bits of SmolLM2-135M in TFLite and Core ML: perplexity beside a cache of float numbers.

    python benchmarks/smollm2_model.py --texts FOLDER --out build/smollm2      # the float reference
    python benchmarks/smollm2_caches.py --texts FOLDER --model build/smollm2 [--formats tflite coreml]

Float weights (float32 in TFLite, float16 in Core ML, whose programs run on the reference executor), the
first tokens of the evaluation part of each text in one context, read in chunks; scales from `--rows` rows of
256 tokens of the training part. Core ML's float cache is float16.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import smollm2
import smollm2_model
import torch
from transformers import LlamaForCausalLM

from edgecomp import registry
from edgecomp.language import cache, weights
from edgecomp.language.decoder import Decoder, from_transformers
from edgecomp.spec import Candidate, TensorSpec

TARGETS = {"tflite": ("tflite-fp32", ".tflite"), "coreml": ("coreml-fp16", ".mlpackage")}


def measured(
    arguments: argparse.Namespace, decoder: Decoder, streams: Any, samples: Any, form: str, storage: str
) -> dict[str, Any]:
    """Perplexity of each text's first tokens, and the bytes of the cache."""
    begun = Candidate(decoder, (TensorSpec("ids", (1, smollm2.ROW), "int64"),), original=decoder)
    target, suffix = TARGETS[form]
    room = arguments.tokens[form]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"m{suffix}"
        scales = cache.scales_from(decoder, samples, storage)  # type: ignore[arg-type]
        registry.load("decoders", form)(
            begun, weights.of(begun), path, target=target, room=room, chunk=arguments.chunk, storage=storage,
            scales=scales,
        )  # fmt: skip
        session = registry.load("decoder_runtimes", form)(path, room, 1)
        found, began = {}, time.time()
        for name, stream in streams.items():
            session.reset()
            ids, total = stream[:room].numpy(), 0.0
            for start in range(0, room, arguments.chunk):
                logits = torch.from_numpy(session.step(ids[start : start + arguments.chunk]))
                following = torch.from_numpy(ids[start + 1 : start + arguments.chunk + 1])
                total += float(
                    torch.nn.functional.cross_entropy(logits[: len(following)], following, reduction="sum")
                )
            found[name] = float(np.exp(total / (room - 1)))
        result = {
            "format": form, "cache": storage, "tokens": room, "perplexity": found,
            "cache_bytes": session.cache_bytes, "seconds": time.time() - began,
        }  # fmt: skip
        del session
        shutil.rmtree(path, ignore_errors=True)
    return result


def main() -> None:
    parser = smollm2_model.parser(__doc__)
    parser.add_argument("--formats", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--caches", nargs="+", default=["float32", "int8", "int4"])
    parser.add_argument("--tflite-tokens", type=int, default=2048)
    parser.add_argument("--coreml-tokens", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.tokens = {"tflite": arguments.tflite_tokens, "coreml": arguments.coreml_tokens}
    decoder = from_transformers(LlamaForCausalLM.from_pretrained(arguments.model))
    train, streams = smollm2_model.streams(arguments.model, arguments.texts)
    samples = [torch.from_numpy(r)[None] for r in smollm2.rows_of(train, arguments.rows)]
    results = []
    for form in arguments.formats:
        for storage in arguments.caches:
            results.append(measured(arguments, decoder, streams, samples, form, storage))
            print(json.dumps(results[-1]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
