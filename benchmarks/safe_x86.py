"""EfficientNet-Lite0 in INT8 on an x86 without VNNI: does the optimized session say what the file says?

    python benchmarks/safe_x86.py [--images 100] [--emulated 12] [--folder DIR] [--json PATH]

Three files: our onnx-qdq, the same with `safe_x86`, and ONNX Runtime's quantize_static (U8S8, per channel).
Each is run as written (graph optimizations off) and with ONNX Runtime's default optimizations on this
machine, which should have VNNI, and the first --emulated crops optimized on an emulated Haswell
(qemu-x86_64: AVX2, whose 8-bit multiply-add saturates at 16 bits). The files take turns on each crop. Where
Haswell's outputs are this machine's bit for bit, nothing saturated, and the figures of all crops hold there.
Files that are in --folder already are not made again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

FILES = {"plain": "edgecomp onnx-qdq", "safe": "edgecomp onnx-qdq, safe_x86", "ort": "ONNX Runtime U8S8"}


def make(folder: Path, calibration: np.ndarray) -> None:
    """Our two files from one plan, and the peer's, from the same crops."""
    import efficientnet_int8 as shared
    import efficientnet_peers as peers

    from edgecomp import registry
    from edgecomp.spec import Candidate, Data

    model, data = shared.float_model(), Data(calibration=shared.Crops(calibration))
    if not all((folder / f"{n}.onnx").exists() for n in ("plain", "safe")):
        plan = registry.load("steps", "quantize")()(Candidate(model, (shared.INPUT,)), data)
        exporter = registry.load("exporters", "onnx-qdq")
        for name, safe in (("plain", False), ("safe", True)):
            exporter(safe_x86=safe).export(plan, data, folder / f"{name}.onnx")
    if not (folder / "ort.onnx").exists():
        peers.onnxruntime_static()(shared.float_model(), calibration, folder / "ort.onnx")


def scores(folder: Path, images: np.ndarray, optimize: bool) -> dict[str, np.ndarray]:
    """Outputs of each file; the files take turns on each crop."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    sessions = {name: ort.InferenceSession(str(folder / f"{name}.onnx"), options) for name in FILES}
    found: dict[str, list[np.ndarray]] = {name: [] for name in FILES}
    for index, image in enumerate(images):
        for name, session in sessions.items():
            found[name].append(session.run(None, {session.get_inputs()[0].name: image[None]})[0])
        print(f"crop {index + 1} of {len(images)}", file=sys.stderr, flush=True)
    return {name: np.concatenate(rows) for name, rows in found.items()}


def emulated(folder: Path) -> dict[str, np.ndarray]:
    """The optimized sessions' outputs on an emulated Haswell."""
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        raise SystemExit("this benchmark needs qemu-x86_64: apt-get install qemu-user")
    environment = {**os.environ, "QEMU_CPU": "Haswell", "OMP_NUM_THREADS": "1"}
    command = [qemu, sys.executable, __file__, "--task", "optimized", "--folder", str(folder)]
    subprocess.run(command, check=True, env=environment)
    with np.load(folder / "optimized.npz") as stored:
        return dict(stored)


def figures(
    title: str, path: Path, exact: np.ndarray, here: np.ndarray, haswell: np.ndarray, real: np.ndarray
) -> dict[str, Any]:
    from edgecomp.numerics import metrics

    def pair(expected: np.ndarray, found: np.ndarray) -> list[float]:
        rows = expected[: len(found)]
        return [metrics.sqnr_db(rows, found), metrics.top1_agreement(rows, found)]

    same = (here[: len(haswell)] == haswell).all(axis=tuple(range(1, haswell.ndim)))
    return {
        "file": title,
        "size_bytes": path.stat().st_size,
        "exact_to_float": pair(real, exact),
        "vnni_to_exact": pair(exact, here),
        "haswell_to_float": pair(real, haswell),
        "haswell_to_exact": pair(exact, haswell),
        "haswell_same_as_vnni": float(same.mean()),
        "images": len(exact),
        "emulated": len(haswell),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"SQNR and top-1 agreement; {rows[0]['images']} crops, on Haswell the first {rows[0]['emulated']}.",
        "",
        "| file | MB | as written to float | VNNI to as written | Haswell to float | Haswell to as written "
        "| Haswell as VNNI |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        keys = ("exact_to_float", "vnni_to_exact", "haswell_to_float", "haswell_to_exact")
        pairs = (f"{r[k][0]:.1f} dB, {r[k][1]:.2f}" for k in keys)
        last = f"{r['haswell_same_as_vnni']:.0%}"
        lines.append(f"| {r['file']} | {r['size_bytes'] / 1e6:.2f} | {' | '.join(pairs)} | {last} |")
    return "\n".join(lines)


def run(folder: Path, images: int, emulate: int, calibration: int) -> list[dict[str, Any]]:
    import efficientnet_int8 as shared
    import photos
    import torch

    make(folder, photos.calibration(calibration))
    crops = photos.evaluation(images)
    np.save(folder / "evaluation.npy", crops[:emulate])
    with torch.no_grad():
        real = shared.float_model()(torch.from_numpy(crops)).numpy()
    haswell = emulated(folder)
    exact, here = (scores(folder, crops, optimize) for optimize in (False, True))
    return [
        figures(title, folder / f"{n}.onnx", exact[n], here[n], haswell[n], real)
        for n, title in FILES.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100, help="evaluation crops")
    parser.add_argument("--emulated", type=int, default=12, help="of these on the emulated processor")
    parser.add_argument("--calibration", type=int, default=128, help="calibration crops")
    parser.add_argument("--folder", type=Path, help="keep the files here")
    parser.add_argument("--json", metavar="PATH", help="write the figures there too")
    parser.add_argument("--task", choices=("optimized",), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        found = scores(options.folder, np.load(options.folder / "evaluation.npy"), optimize=True)
        np.savez(options.folder / "optimized.npz", **found)
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        rows = run(folder, options.images, options.emulated, options.calibration)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
