"""4-bit SmolLM2-135M: perplexity beside ONNX Runtime's own methods, bytes, decode speed, and an int8 cache.

    python benchmarks/smollm2_model.py --texts FOLDER --out build/smollm2      # the float reference
    python benchmarks/smollm2.py --texts FOLDER --model build/smollm2 [--only perplexity,speed,cache]

The shipped weights lie on a 4-bit grid of groups of 32 already, which would flatter every method there: the
reference is the model of `smollm2_model.py`, fine-tuned off that grid. Perplexity: windows of `--window`
tokens, stride the same (no overlap), the first `--windows` of the evaluation part of each text; calibration
is `--rows` rows of 256 tokens of the training part. All methods round the same float model and are evaluated
by the same float arithmetic on their restored weights. `lost` is perplexity - float perplexity. Speed:
medians of turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import smollm2_model
import smollm2_peers as peers
import torch
from transformers import LlamaForCausalLM

from edgecomp.compress.groupwise import QuantizeWeights
from edgecomp.exporters.onnx_decoder import export
from edgecomp.language import cache, weights
from edgecomp.language.decoder import Decoder, from_transformers
from edgecomp.runtimes.onnxruntime_decoder import OnnxDecoder
from edgecomp.spec import Batch, Candidate, Data, TensorSpec

ROW = 256


class Rows:
    """Rows of token ids as a data source."""

    labels: tuple[str, ...] = ()
    preprocessing = None

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, len(self.rows), size):
            yield Batch((self.rows[start : start + size],))


def rows_of(streams: list[torch.Tensor], count: int) -> np.ndarray:
    """[count, ROW] from all streams alike, evenly spaced."""
    found = []
    for stream in streams:
        starts = np.linspace(0, len(stream) - ROW, count // len(streams)).astype(int)
        found += [stream[s : s + ROW].numpy() for s in starts]
    return np.stack(found)


@torch.no_grad()
def perplexity(
    decoder: Decoder, streams: dict[str, torch.Tensor], window: int, count: int
) -> dict[str, float]:
    found = {}
    for name, stream in streams.items():
        total, tokens = 0.0, 0
        for start in range(0, min(count * window, len(stream) - window), window):
            ids = stream[start : start + window]
            logits = decoder(ids[None])[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
            tokens += len(ids) - 1
        found[name] = math.exp(total / tokens)
    return found


def ours(decoder: Decoder, rows: np.ndarray, **settings: Any) -> Candidate:
    begun = Candidate(decoder, (TensorSpec("ids", (1, ROW), "int64"),), original=decoder)
    step = QuantizeWeights(samples=len(rows), **settings)
    return step(begun, Data(calibration=Rows(rows)))


def compare(arguments: argparse.Namespace, decoder: Decoder, streams: Any, rows: np.ndarray) -> list[dict]:
    results: list[dict[str, Any]] = []

    def report(name: str, group: int | None, found: Decoder, seconds: float) -> None:
        measured = perplexity(found, streams, arguments.window, arguments.windows)
        lost = {n: v - results[0]["perplexity"][n] for n, v in measured.items()} if results else {}
        results.append(
            {"method": name, "group_size": group, "perplexity": measured, "lost": lost, "seconds": seconds}
        )
        told = ", ".join(f"{n} {v:.3f}" + (f" (+{lost[n]:.3f})" if lost else "") for n, v in measured.items())
        if arguments.json:
            arguments.json.write_text(json.dumps({"perplexity": results}, indent=2) + "\n")
        print(f"{name:34} {group or '':>4}  {told}   [{seconds:.0f} s]", flush=True)

    report("float32", None, decoder, 0.0)
    tensors = [torch.from_numpy(r)[None] for r in rows]
    for group in arguments.groups:
        for name, make in cases(decoder, rows, tensors, group).items():
            if arguments.methods and not any(word in name for word in arguments.methods):
                continue
            began = time.time()
            made = make()
            report(name, group, made, time.time() - began)
    return results


def cases(
    decoder: Decoder, rows: np.ndarray, tensors: list[torch.Tensor], group: int
) -> dict[str, Callable[[], Decoder]]:
    """Name -> what gives the decoder with its weights rounded and restored."""
    made: dict[str, Callable[[], Decoder]] = {}
    for symmetric, kind in ((False, "asymmetric"), (True, "symmetric")):
        common = {"group_size": group, "symmetric": symmetric}
        made[f"ONNX Runtime RTN {kind}"] = partial(peers.alone, decoder, peers.rtn(symmetric), group)
        for name, settings in (("GPTQ", {}), ("GPTQ + AWQ", {"scaling": "awq"}), ("RTN", {"method": "rtn"})):
            made[f"ours {name} {kind}"] = lambda c=common, s=settings: restored(ours(decoder, rows, **c, **s))
    made["ONNX Runtime HQQ, float zero points"] = partial(peers.alone, decoder, peers.hqq, group)
    made["ONNX Runtime GPTQ asymmetric"] = partial(peers.by_gptq, decoder, tensors, group, False)
    return made


def restored(candidate: Candidate) -> Decoder:
    return weights.of(candidate).restored()


def speed(arguments: argparse.Namespace, decoder: Decoder, rows: np.ndarray, folder: Path) -> dict[str, Any]:
    """Milliseconds a decoded token after a prompt of 64, float32 and 4 bits in turns; bytes of both files."""
    begun = Candidate(decoder, (TensorSpec("ids", (1, ROW), "int64"),), original=decoder)
    four = ours(decoder, rows, method="rtn", group_size=32)
    paths = {}
    for name, target, found, level in (
        ("float32", "onnx-fp32", begun, 0), ("int4", "onnx-int4", four, 0),
        ("int4, int8 activations", "onnx-int4", four, 4),
    ):  # fmt: skip
        paths[name] = folder / f"{len(paths)}.onnx"
        export(found, weights.of(found), paths[name], target=target, room=512, accuracy_level=level)
    sessions = {name: OnnxDecoder(path, 512, arguments.threads) for name, path in paths.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(arguments.turns):
        for name, session in sessions.items():
            session.reset()
            session.step(rows[0, :64])
            for token in rows[1, :24]:
                began = time.perf_counter()
                session.step(np.array([token]))
                times[name].append(1000 * (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in times.items()}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    result = {
        "ms_per_token": medians,
        "faster_than_float32": {n: medians["float32"] / m for n, m in medians.items()},
        "bytes": sizes,
        "share_of_float32": {n: s / sizes["float32"] for n, s in sizes.items()},
    }
    print(json.dumps(result, indent=2), flush=True)
    return result


def small_cache(
    arguments: argparse.Namespace, decoder: Decoder, streams: Any, rows: np.ndarray, folder: Path
) -> dict[str, Any]:
    """Perplexity of 2,048 tokens of each text, and of their beginnings, with each cache; its bytes."""
    begun = Candidate(decoder, (TensorSpec("ids", (1, ROW), "int64"),), original=decoder)
    decided = weights.of(begun)
    samples = [torch.from_numpy(r)[None] for r in rows]
    result: dict[str, Any] = {}
    for storage in arguments.caches:
        scales = cache.scales_from(decoder, samples, storage)  # type: ignore[arg-type]
        path = folder / f"cache-{storage}.onnx"
        export(
            begun, decided, path, target="onnx-fp32", room=2048, storage=storage, scales=scales,  # type: ignore[arg-type]
        )  # fmt: skip
        session = OnnxDecoder(path, 2048, arguments.threads)
        found = {}
        for name, stream in streams.items():
            session.reset()
            ids = stream[:2048].numpy()
            logits = [session.step(ids[i : i + 64]) for i in range(0, 2048, 64)]
            scores = torch.from_numpy(np.concatenate(logits)[:-1])
            loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(ids[1:]), reduction="none")
            places = {f"first {n}": slice(None, n) for n in (512, 1024)}
            places |= {"all": slice(None), "last 512": slice(-512, None)}
            found[name] = {k: float(loss[s].mean().exp()) for k, s in places.items()}
        result[storage] = {"perplexity": found, "cache_bytes": session.cache_bytes}
        print(storage, json.dumps(result[storage]), flush=True)
        path.unlink()
    return result


def main() -> None:
    parser = smollm2_model.parser(__doc__)
    parser.add_argument("--only", default="perplexity,speed,cache")
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--methods", nargs="*", help="Only methods whose name holds one of these words.")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--caches", nargs="+", default=["float32", "int8", "int4"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--names", nargs="*", help="Only these texts: novel, mails.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    decoder = from_transformers(LlamaForCausalLM.from_pretrained(arguments.model))
    train, streams = smollm2_model.streams(arguments.model, arguments.texts)
    streams = {n: s for n, s in streams.items() if not arguments.names or n in arguments.names}
    rows = rows_of(train, arguments.rows)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if "perplexity" in arguments.only:
            result["perplexity"] = compare(arguments, decoder, streams, rows)
        if "speed" in arguments.only:
            result["speed"] = speed(arguments, decoder, rows, folder)
        if "cache" in arguments.only:
            result["cache"] = small_cache(arguments, decoder, streams, rows, folder)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
