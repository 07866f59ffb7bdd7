"""NNCF's post-training quantization of an ONNX file, run by the Python of an environment that has nncf (see
int8_zoo.py).
"""

import logging
import sys

import nncf
import numpy as np
import onnx


def main(source: str, calibration: str, result: str, preset: str) -> None:
    nncf.set_log_level(logging.ERROR)
    arrays = np.load(calibration)
    names = list(arrays.files)
    rows = [{name: arrays[name][i : i + 1] for name in names} for i in range(len(arrays[names[0]]))]
    settings = {"preset": nncf.QuantizationPreset.MIXED} if preset == "mixed" else {}
    if preset == "transformer":
        settings = {"model_type": nncf.ModelType.TRANSFORMER}
    quantized = nncf.quantize(onnx.load(source), nncf.Dataset(rows), subset_size=len(rows), **settings)
    onnx.save(quantized, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
