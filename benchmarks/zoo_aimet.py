"""AIMET's quantization simulation of an ONNX file, run by the Python of an environment with aimet-onnx."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import aimet_onnx
import numpy as np
import onnx
from aimet_onnx.common.defs import QuantScheme


def main(source: str, calibration: str, result: str, scheme: str) -> None:
    """`scheme`: min_max or tf_enhanced (ranges by SQNR).

    AIMET puts a quantizer between each convolution and its ReLU6 where the file spells it as a Clip that
    it does not fuse; these are switched off, which lifts EfficientNet-Lite0 from 7.5 to 18 dB.
    """
    model = onnx.load(source)
    config = Path(aimet_onnx.common.__path__[0]) / "quantsim_config" / "default_config_per_channel.json"
    simulation = aimet_onnx.QuantizationSimModel(
        model, param_type=aimet_onnx.int8, activation_type=aimet_onnx.int8,
        quant_scheme=getattr(QuantScheme, {"min_max": "min_max"}.get(scheme, f"post_training_{scheme}")),
        config_file=str(config), providers=["CPUExecutionProvider"],
    )  # fmt: skip
    users: dict[str, list[str]] = {}
    graph = onnx.load(source).graph
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node.op_type)
    for node in graph.node:
        between = node.op_type == "Conv" and users.get(node.output[0], [""])[0] == "Clip"
        if between and node.output[0] in simulation.qc_quantize_op_dict:
            simulation.qc_quantize_op_dict[node.output[0]].enabled = False
    arrays = np.load(calibration)
    count = len(arrays[arrays.files[0]])
    simulation.compute_encodings([{n: arrays[n][i : i + 1] for n in arrays.files} for i in range(count)])
    onnx.save(simulation.to_onnx_qdq(prequantize_constants=True, export_int32_bias=True), result)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    main(*sys.argv[1:])
