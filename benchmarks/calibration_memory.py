"""Memory of calibration: 10,000 pictures of 224 px in 2 GB of address space, against the in-memory answer.

Each side runs in a process of its own. Ours: `Quantize` over an `.npy` of 8-bit pictures, under
RLIMIT_AS (`ulimit -v`). The in-memory answer: plain torch, all pictures loaded, minimum and maximum of every
layer by hooks. Beside them ONNX Runtime's own calibrators, without a limit.

    python benchmarks/calibration_memory.py [--samples 10000] [--histogram-samples 250]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import photos
import torch
from PIL import Image
from torch import nn

from edgecomp.calibration_data.arrays import Arrays
from edgecomp.spec import Preprocessing

HOW = Preprocessing(size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
LIMIT_BYTES = 2_000_000_000


def network() -> nn.Module:
    torch.manual_seed(0)
    widths, layers = (3, 8, 16, 32), []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()


def make_pictures(path: Path, count: int) -> None:
    """Crops of scikit-image's photographs, uint8 [count, 224, 224, 3]."""
    files = [photos.folder_of("skimage") / "data" / name for name in photos.SKIMAGE]
    pictures = [np.asarray(Image.open(f).convert("RGB")) for f in files]
    pictures = [p for p in pictures if min(p.shape[:2]) >= 224]
    rng = np.random.default_rng(0)
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 224, 224, 3))
    for i in range(count):
        picture = pictures[i % len(pictures)]
        top, left = (int(rng.integers(0, s - 223)) for s in picture.shape[:2])
        array[i] = picture[top : top + 224, left : left + 224]
    array.flush()


def ours(path: Path, samples: int) -> dict[str, list[float]]:
    """Ranges by module name, from the plan's scales."""
    from edgecomp.compress.ptq import Quantize
    from edgecomp.spec import Candidate, Data, TensorSpec

    source = Arrays(str(path), HOW)
    candidate = Candidate(network(), (TensorSpec("x", (1, 3, 224, 224), layout="NCHW"),))
    done = Quantize(observer="minmax", samples=samples)(candidate, Data(calibration=source))
    found = {}
    for node in done.module.graph.nodes:
        q = done.quantization.activations.get(node.name)
        if node.op == "call_function" and q is not None and node.meta.get("module"):
            scale, zero = float(q.scale), int(q.zero_point)
            found[node.meta["module"]] = [(-128 - zero) * scale, (127 - zero) * scale]
    return found


def in_memory(path: Path, samples: int) -> dict[str, list[float]]:
    """Exact extremes of every layer, widened to hold zero as an affine scale must."""
    raw = np.load(path)[:samples]
    mean, std = torch.tensor(HOW.mean).view(1, 3, 1, 1), torch.tensor(HOW.std).view(1, 3, 1, 1)
    model, found = network(), {}

    def keep(name: str) -> object:
        def hook(_: nn.Module, __: object, output: torch.Tensor) -> None:
            low, high = (float(v) for v in torch.aminmax(output))
            before = found.get(name, [0.0, 0.0])
            found[name] = [min(before[0], low), max(before[1], high)]

        return hook

    for name, module in model.named_children():
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        for start in range(0, samples, 100):
            pixels = torch.from_numpy(raw[start : start + 100]).permute(0, 3, 1, 2).float() / 255
            model((pixels - mean) / std)
    return found


def onnxruntimes(path: Path, samples: int, method: str) -> dict[str, list[float]]:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = Arrays(str(path), HOW).batches(1)
            self.left = samples

        def get_next(self) -> dict[str, np.ndarray] | None:
            self.left -= 1
            return {"x": next(self.batches).inputs[0]} if self.left >= 0 else None

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.onnx"
        torch.onnx.export(
            network(), (torch.zeros(1, 3, 224, 224),), file, input_names=["x"], dynamo=True, verbose=False
        )
        calibrator = create_calibrator(
            str(file), None, str(Path(folder) / "augmented.onnx"), CalibrationMethod[method]
        )
        calibrator.collect_data(Reader())
        data = calibrator.compute_data()
    return {name: [float(np.ravel(v)[0]) for v in t.range_value] for name, t in data.items()}


def peak_rss_mb() -> int:
    """Of this process alone: `ru_maxrss` would count what the parent held when it forked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) // 1024


def child(task: str, path: Path, samples: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started = time.perf_counter()
    if task == "ours":
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        found = ours(path, samples)
    elif task == "memory":
        found = in_memory(path, samples)
    else:
        found = onnxruntimes(path, samples, task)
    facts = {
        "ranges": found,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_mb": peak_rss_mb(),
    }
    print(json.dumps(facts))


def run(task: str, path: Path, samples: int) -> dict[str, object]:
    words = [sys.executable, __file__, "--child", task, "--file", str(path), "--samples", str(samples)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        return {"failed": " ".join(done.stderr.split()[-30:]), "samples": samples}
    facts: dict[str, object] = {"samples": samples, **json.loads(done.stdout.splitlines()[-1])}
    return facts


def largest_difference(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    """Of two sets of ranges, as a share of the range; modules that both name."""
    shared = [n for n in a if n in b and b[n][1] > b[n][0]]
    return max(abs((a[n][1] - a[n][0]) / (b[n][1] - b[n][0]) - 1) for n in shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--histogram-samples", type=int, default=250)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.file, options.samples)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pictures.npy"
        make_pictures(path, options.samples)
        results = {
            "edgecomp, 2 GB of address space": run("ours", path, options.samples),
            "in memory": run("memory", path, options.samples),
            "onnxruntime MinMax": run("MinMax", path, options.samples),
            "onnxruntime Percentile": run("Percentile", path, options.histogram_samples),
        }
    mine, exact = (results[n].pop("ranges", {}) for n in list(results)[:2])
    for facts in results.values():
        facts.pop("ranges", None)
    difference = largest_difference(mine, exact) if mine and exact else None
    print(json.dumps({**results, "largest_difference_of_a_range": difference}, indent=2))


if __name__ == "__main__":
    main()
