"""EfficientNet-Lite0 as 4-bit Core ML palettes within 3.2 MB, beside coremltools' palettize_weights.

    python benchmarks/coreml_palettes.py [--images 100] [--samples 48] [--contender NAME] [--pictures skimage]
                                         [--json PATH]

Contenders, one after another in this process, from the float torch model to a package: ours with
`size: 3.2MB`; coremltools 9.0 with k-means, one palette per tensor, and one for each output channel (iOS 18).
Calibration (ours): crops of scikit-image's pictures, no labels. Figures are those of our Linux executor
against the float model on crops of foolbox's ImageNet pictures, or with `--pictures skimage` on other crops
of the pictures that calibrated (textures, microscopy, a page: top scores lie close together). Seconds are of
this process's CPU time and of the clock.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgecomp import door, files
from edgecomp.exporters.coreml import CoreMLExporter
from edgecomp.numerics import metrics
from edgecomp.runtimes.coreml import CoreMLRuntime
from edgecomp.spec import Candidate, Data

Work = Callable[[nn.Module, np.ndarray, Path], None]


def ours(samples: int) -> Work:
    def work(model: nn.Module, calibration: np.ndarray, path: Path) -> None:
        import efficientnet_int8 as shared

        data = Data(calibration=shared.Crops(calibration))
        exporter = CoreMLExporter(size="3.2MB", samples=samples)
        exporter.export(Candidate(model, (shared.INPUT,)), data, path)

    return work


def coremltools_by(channels: int | None) -> Work:
    import coremltools as ct  # isort: skip
    import coremltools.optimize.coreml as cto  # isort: skip

    def work(model: nn.Module, calibration: np.ndarray, path: Path) -> None:
        import efficientnet_int8 as shared

        traced = torch.jit.trace(model, torch.zeros(shared.INPUT.shape))
        converted = ct.convert(
            traced, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18,
            inputs=[ct.TensorType("image", shared.INPUT.shape)], outputs=[ct.TensorType("output")],
            compute_units=ct.ComputeUnit.CPU_ONLY, skip_model_load=True,
        )  # fmt: skip
        how = {"granularity": "per_grouped_channel", "group_size": channels} if channels else {}
        settings = cto.OpPalettizerConfig(mode="kmeans", nbits=4, **how)
        cto.palettize_weights(converted, cto.OptimizationConfig(global_config=settings)).save(str(path))

    return work


def measure(title: str, work: Work, images: np.ndarray, calibration: np.ndarray) -> dict[str, Any]:
    import efficientnet_int8 as shared

    model = shared.float_model()
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "m.mlpackage"
        clock, spent = time.perf_counter(), time.process_time()
        work(model, calibration, path)
        clock, spent = time.perf_counter() - clock, time.process_time() - spent
        found = door.run_float(CoreMLRuntime().open(path), [images])[0]
        size = files.size_bytes(path)
    with torch.no_grad():
        real = np.concatenate([model(torch.from_numpy(i[None])).numpy() for i in images])
    return {
        "contender": title,
        "size_bytes": size,
        "seconds": clock,
        "cpu_seconds": spent,
        "sqnr_db": metrics.sqnr_db(real, found),
        "top1_agreement": metrics.top1_agreement(real, found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--samples", type=int, default=48, help="calibration crops")
    parser.add_argument("--contender", action="append", choices=("ours", "tensor", "channel"))
    parser.add_argument("--pictures", choices=("foolbox", "skimage"), default="foolbox")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import photos

    contenders = {
        "ours": ("edgecomp coreml-pal4, size 3.2MB", lambda: ours(options.samples)),
        "tensor": ("coremltools, a palette per tensor", lambda: coremltools_by(None)),
        "channel": ("coremltools, a palette per channel", lambda: coremltools_by(1)),
    }
    calibration = photos.calibration(options.samples)
    if options.pictures == "foolbox":
        images = photos.evaluation(options.images)
    else:
        data = photos.folder_of("skimage") / "data"
        images = photos.crops([data / name for name in photos.SKIMAGE], options.images, seed=5)
    rows = []
    print("| contender | MB | seconds (CPU) | SQNR dB | top-1 |\n| --- | --- | --- | --- | --- |", flush=True)
    for name in options.contender or list(contenders):
        title, prepare = contenders[name]
        rows.append(measure(title, prepare(), images, calibration))
        r = rows[-1]
        print(
            f"| {title} | {r['size_bytes'] / 1e6:.2f} | {r['seconds']:.0f} ({r['cpu_seconds']:.0f}) "
            f"| {r['sqnr_db']:.2f} | {r['top1_agreement']:.2f} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
