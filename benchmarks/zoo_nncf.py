"""NNCF's post-training quantization of an ONNX file, run by the Python of an environment that has nncf (see
int8_zoo.py and efficientnet_peers.py).
"""

import logging
import sys

import nncf
import numpy as np
import onnx
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

_MIXED = {"preset": nncf.QuantizationPreset.MIXED}
_NO_FIX = {
    **_MIXED, "advanced_parameters": AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE)
}  # fmt: skip
WAYS = {
    "default": {},
    "mixed": _MIXED,
    "mixed-no-fix": _NO_FIX,
    "mixed-no-fix-full-correction": {**_NO_FIX, "fast_bias_correction": False},
    "transformer": {"model_type": nncf.ModelType.TRANSFORMER},
}


def main(source: str, calibration: str, result: str, way: str) -> None:
    nncf.set_log_level(logging.ERROR)
    arrays = np.load(calibration)
    names = list(arrays.files)
    rows = [{name: arrays[name][i : i + 1] for name in names} for i in range(len(arrays[names[0]]))]
    quantized = nncf.quantize(onnx.load(source), nncf.Dataset(rows), subset_size=len(rows), **WAYS[way])
    onnx.save(quantized, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
