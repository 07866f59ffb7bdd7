"""Mixed bits under a size budget on SmolLM2-135M: perplexity beside uniform bits of the same bytes.

    python benchmarks/smollm2_model.py --texts FOLDER --out build/smollm2      # the float reference
    python benchmarks/smollm2_budget.py --texts FOLDER --model build/smollm2 [--bits 4 3]

For each of `--bits` GPTQ rounds every weight, embedding and head included, to that many bits (symmetric
groups of `--group`), and then to 2, 3, 4, 6 or 8 bits by measured sensitivity within the bytes that the
uniform model took. Windows and rows as in smollm2.py. `bytes`: integers, and scales of 16 bits; a tied
table counts once.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import smollm2
import smollm2_model
from transformers import LlamaForCausalLM

from edgecomp.language.decoder import from_transformers
from edgecomp.spec import Candidate


def stored_bytes(candidate: Candidate) -> int:
    """Of the plan's integers and scales, each table once."""
    plan = candidate.quantization.weights if candidate.quantization else {}
    distinct = {id(q): q for q in plan.values() if q.values is not None}
    return round(sum(q.values.size * q.spec.bits / 8 + 2 * q.scale.size for q in distinct.values()))


def main() -> None:
    parser = smollm2_model.parser(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--budgets", type=int, nargs="*", default=[], help="Only mixed bits in these bytes.")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    decoder = from_transformers(LlamaForCausalLM.from_pretrained(arguments.model))
    train, streams = smollm2_model.streams(arguments.model, arguments.texts)
    rows = smollm2.rows_of(train, arguments.rows)
    results: list[dict[str, Any]] = []

    def report(name: str, made: Candidate | None, seconds: float) -> int:
        found = decoder if made is None else smollm2.restored(made)
        measured = smollm2.perplexity(found, streams, arguments.window, arguments.windows)
        size = 0 if made is None else stored_bytes(made)
        notes = [] if made is None else [n for n in made.history[-1].notes if n.startswith("weights: ")]
        results.append(
            {"method": name, "perplexity": measured, "bytes": size, "seconds": seconds, "notes": notes}
        )
        print(json.dumps(results[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")
        return size

    report("float32", None, 0.0)
    common = {"group_size": arguments.group}
    for size in arguments.budgets:
        began = time.time()
        made = smollm2.ours(decoder, rows, size_budget=size, **common)
        report(f"mixed, {size} bytes", made, time.time() - began)
    for bits in arguments.bits if not arguments.budgets else []:
        began = time.time()
        made = smollm2.ours(decoder, rows, bits=bits, embedding_bits=bits, **common)
        size = report(f"uniform {bits}", made, time.time() - began)
        began = time.time()
        made = smollm2.ours(decoder, rows, size_budget=size, **common)
        report(f"mixed, the bytes of {bits}", made, time.time() - began)


if __name__ == "__main__":
    main()
