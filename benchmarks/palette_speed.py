"""A model of 100 million weights palettized to 4 bits: CPU seconds and error beside coremltools' k-means.

The weights are float16, as in a float16 program: the matrices of a transformer of 14 layers (width 768),
drawn from a Student distribution with 5 degrees of freedom, seed 0. Both sides work in one process, on one
thread, tensor after tensor, in turns; coremltools runs its exact kmeans1d. One palette a tensor on both
sides; groups of 16 output channels on ours, with the exact optimum by kmeans1d on every hundredth group.

    python benchmarks/palette_speed.py [--parts tensor,group] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from edgecomp.exporters.coreml_toolkit import VERSION, quiet
from edgecomp.numerics import palettes

with quiet():
    from coremltools.models.neural_network.quantization_utils import _get_kmeans_lookup_table_and_weight

_LAYER = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
_SHAPES = _LAYER * 14
_GROUP = 16


def weights() -> Iterator[np.ndarray]:
    generator = np.random.default_rng(0)
    for rows, columns in _SHAPES:
        yield (generator.standard_t(5, (rows, columns)) * 0.03).astype(np.float16)


def ours(rows: np.ndarray) -> np.ndarray:
    return palettes.fit(rows.astype(np.float32), 16).values()


def theirs(rows: np.ndarray) -> np.ndarray:
    found = np.empty(rows.shape, np.float32)
    for i, row in enumerate(rows):
        lut, indices = _get_kmeans_lookup_table_and_weight(4, row, force_kmeans1d=True)
        found[i] = lut.reshape(-1).astype(np.float16)[indices]
    return found


def timed(function: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> tuple[float, float]:
    """CPU seconds, and the sum of squared errors."""
    began = time.process_time()
    values = function(rows)
    spent = time.process_time() - began
    return spent, float(np.square(values - rows.astype(np.float32)).sum())


def by_tensor() -> dict[str, float]:
    seconds, error = {"ours": 0.0, "coremltools": 0.0}, {"ours": 0.0, "coremltools": 0.0}
    for turn, weight in enumerate(weights()):
        sides = [("ours", ours), ("coremltools", theirs)]
        for name, function in sides if turn % 2 == 0 else sides[::-1]:
            spent, off = timed(function, weight.reshape(1, -1))
            seconds[name] += spent
            error[name] += off
    return {
        "ours_s": seconds["ours"],
        "coremltools_s": seconds["coremltools"],
        "error_ratio": error["ours"] / error["coremltools"],
    }


def by_group() -> dict[str, float]:
    seconds = 0.0
    mine = best = 0.0
    for weight in weights():
        rows = weight.reshape(len(weight) // _GROUP, -1)
        seconds += timed(ours, rows)[0]
        part = rows[::100]
        mine += timed(ours, part)[1]
        best += timed(theirs, part)[1]
    return {"ours_s": seconds, "error_over_optimum": mine / best}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="tensor,group")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    count = sum(rows * columns for rows, columns in _SHAPES)
    result: dict[str, object] = {"weights": count, "coremltools": VERSION}
    if "tensor" in arguments.parts:
        result["tensor"] = by_tensor()
    if "group" in arguments.parts:
        result["group_16"] = by_group()
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
