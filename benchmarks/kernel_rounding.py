"""Which of LiteRT's kernels round otherwise than the plan, one by one, in MiniLM's file of 8 and 16 bits.

    python benchmarks/kernel_rounding.py [--layers 4] [--calibration 8] [--samples 40]

MiniLM with its first layers is quantized as in int8_zoo.py (min-max ranges and nearest rounding, which
changes no kernel) and exported as `tflite-int8`. Each operation of the file is compared with the
fake-quantized torch graph on the file's own inputs to it (edgecomp.ladder_local), on 6 sentences: share of
results that are another integer, the largest distance and the mean one, in steps. Operations are added up by
kind; `16 > 8` is computed in 16 bits and narrowed to 8 by QUANTIZE. Below stands how far the outputs of both
sets of kernels lie from each other, and from the torch graph.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import zoo

from edgecomp import door, ladder_local, registry
from edgecomp.calibration_data.arrays import Arrays
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.spec import Batch, Candidate, Data, Session, TensorSpec

_COMPARED = 6
_MOVES = ("reshape", "permute", "expand", "slice", "transpose")


def quantized(layers: int, rows: zoo.Arrays, folder: Path) -> tuple[Candidate, Path]:
    np.savez(folder / "calibration.npz", **{f"inputs_{i}": a for i, a in enumerate(rows)})
    net = zoo.MiniLM().eval()
    net.bert.encoder.layer = net.bert.encoder.layer[:layers]
    specs = tuple(TensorSpec(f"inputs_{i}", (1, *a.shape[1:]), str(a.dtype)) for i, a in enumerate(rows))
    data = Data(calibration=Arrays(str(folder / "calibration.npz")))
    settings = {"rounding": "nearest", "observer": "minmax", **zoo.MEMBERS["minilm"].settings}
    made = registry.load("steps", "quantize")(**settings)(Candidate(net, specs), data)
    path = folder / "mixed.tflite"
    registry.load("exporters", "tflite-int8")(target="tflite-int8").export(made, data, path)
    return made, path


def by_kind(made: Candidate, session: Session, batches: list[Batch]) -> dict[tuple[str, str], list[float]]:
    """(operation, width) -> values compared, values that differ, largest and summed distance in steps."""
    nodes = {n.name: n for n in made.module.graph.nodes}
    plan = made.quantization.activations
    found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0.0])
    for tally in ladder_local.local_errors(made.module, made.quantization, session, batches):
        node = nodes[tally.node]
        if tally.step is None or tally.op in _MOVES or _reads_moved(node):
            continue
        sources = [plan[n.name].spec.bits for n in node.all_input_nodes if n.name in plan]
        bits = plan[tally.node].spec.bits
        width = f"{max([bits, *sources])} > {bits}" if max([bits, *sources]) != bits else str(bits)
        sums = found[tally.op, width]
        sums[0] += tally.count
        # Every difference is one step where the largest is one: their number is the sum of their squares.
        sums[1] += tally.local_noise / tally.step**2
        sums[2] = max(sums[2], tally.largest / tally.step)
        sums[3] += tally.total
    return found


def _reads_moved(node: torch.fx.Node) -> bool:
    """Axes that were moved are another tensor in the file, under the same name: not compared."""
    return any(
        n.target in (torch.ops.aten.permute.default, torch.ops.aten.transpose.int)
        for n in node.all_input_nodes
    )


def distance(a: np.ndarray, b: np.ndarray, step: float) -> str:
    off = np.rint(np.abs(a - b) / step)
    return f"{(off <= 1).mean():.4f} | {(off <= 2).mean():.4f} | {off.max():.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="layers of MiniLM that are kept")
    parser.add_argument("--calibration", type=int, default=8, help="calibration sentences")
    parser.add_argument("--samples", type=int, default=40, help="evaluation sentences")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    data = zoo.MEMBERS["minilm"].data
    inputs = data("evaluation", options.samples)
    batches = [Batch(tuple(a[i : i + 1] for a in inputs)) for i in range(len(inputs[0]))]
    with tempfile.TemporaryDirectory() as place:
        made, path = quantized(options.layers, data("calibration", options.calibration), Path(place))
        runtime = registry.load("runtimes", "tflite")()
        sessions = {w: runtime.open(path, optimize=w == "XNNPACK") for w in ("XNNPACK", "reference")}
        print("| operation | bits | kernels | results | another integer | largest | mean |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for way, session in sessions.items():
            for (op, width), (count, off, most, total) in by_kind(made, session, batches[:_COMPARED]).items():
                if off:
                    figures = f"{count:.0f} | {off / count:.2%} | {most:.0f} | {total / count:+.4f}"
                    print(f"| {op} | {width} | {way} | {figures} |")
        outputs = {w: door.run_float(s, list(inputs))[0] for w, s in sessions.items()}
        step = sessions["XNNPACK"].outputs[0].scale
    graph = fake_quantize(made.module, made.quantization)
    with torch.no_grad():
        parts = [graph(*map(torch.from_numpy, b.inputs)) for b in batches]
    outputs["fake-quantized torch"] = np.concatenate(
        [(p[0] if isinstance(p, list | tuple) else p).numpy() for p in parts]
    )
    print("\n| XNNPACK beside | within one step | within two | largest |\n| --- | --- | --- | --- |")
    for name in ("reference", "fake-quantized torch"):
        print(f"| {name} | {distance(outputs['XNNPACK'], outputs[name], step)} |")


if __name__ == "__main__":
    main()
