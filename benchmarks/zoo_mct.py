"""Sony's Model Compression Toolkit, run by the Python of an environment with model-compression-toolkit.

    PYTHON zoo_mct.py quantize GRAPH.pt CALIBRATION.npz RESULT.pt
    PYTHON zoo_mct.py run RESULT.pt INPUTS.npy OUTPUTS.npy

Its post-training quantization gives a torch module that simulates integers, no deployable INT8 file; that
module is what RESULT.pt holds.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator

import cloudpickle
import numpy as np
import torch

# The toolkit imports torchvision, for detection models alone. Beside a torch of another build torchvision
# lacks its compiled operators; their names are enough here.
_operators = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import model_compression_toolkit as mct  # noqa: E402  after the operator that its import looks up


def quantize(graph: str, calibration: str, result: str) -> None:
    arrays = np.load(calibration)
    rows = torch.from_numpy(arrays[arrays.files[0]])

    def batches() -> Iterator[list[torch.Tensor]]:
        for start in range(0, len(rows), 16):
            yield [rows[start : start + 16]]

    module, _ = mct.ptq.pytorch_post_training_quantization(
        torch.load(graph, weights_only=False), batches,
        target_platform_capabilities=mct.get_target_platform_capabilities(),
    )  # fmt: skip
    torch.save(module.eval(), result, pickle_module=cloudpickle)  # it holds functions made inside functions


def run(module: str, inputs: str, outputs: str) -> None:
    rows = torch.from_numpy(np.load(inputs))
    simulated = torch.load(module, weights_only=False)
    with torch.no_grad():
        found = [simulated(rows[start : start + 1]).numpy() for start in range(len(rows))]
    np.save(outputs, np.concatenate(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    {"quantize": quantize, "run": run}[sys.argv[1]](*sys.argv[2:])
