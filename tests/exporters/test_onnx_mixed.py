"""Activations of 8 and 16 bits in one ONNX file, against the fake-quantized torch graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tflite_functions as functions
import torch
from mixed_plans import mixed
from onnx import TensorProto
from onnx_support import export
from tflite_support import Many, expected, quantized
from torch import nn

from edgecomp.exporters.onnx_graph import Builder
from edgecomp.exporters.onnx_quant import stored_bias
from edgecomp.graph import fake_quant
from edgecomp.runtimes.onnxruntime import OnnxRuntime
from edgecomp.spec import Candidate, QuantSpec, TensorQuantization

FAMILIES = {
    "convolutions": functions.CONVOLUTIONS,
    "networks": functions.NETWORKS,
    "activations": functions.ACTIVATIONS,
    "moves": {"cat": lambda x: torch.cat([x, torch.sigmoid(x)], 1), "flip": lambda x: x.flip(2) + 1},
}


def scales_of(made: Candidate) -> list[float]:
    """One step of every output, in order."""
    assert made.quantization is not None
    found: list[torch.fx.Node] = []
    torch.fx.node.map_arg(made.module.graph.find_nodes(op="output")[0].args, found.append)
    return [float(made.quantization.activations[n.name].scale) for n in found]


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_file_computes_the_fake_quantized_graph(family: str, weight_bits: int, tmp_path: Path) -> None:
    """A float sum that lies half way between two steps may round either way: one step, and rarely."""
    picked, x = FAMILIES[family], functions.PICTURE
    whole = quantized(Many(picked), x, weight_bits=weight_bits)
    for parity in (0, 1):
        made = mixed(whole, lambda n, p=parity: n % 2 == p)
        assert made.quantization is not None
        wanted = expected(fake_quant.fake_quantize(made.module, made.quantization), (x,))
        path = tmp_path / f"{parity}.onnx"
        export(made, path, "onnx-qdq")
        found = OnnxRuntime().open(path, optimize=False).run([x.numpy()])
        for name, reference, real, step in zip(picked, wanted, found, scales_of(made), strict=True):
            off = np.abs(np.rint((real - reference) / step))
            assert off.max() <= 256, name
            assert (off > 1).mean() <= 0.02, name
        assert stored_types(path) >= {"int8", "int16"}


def stored_types(path: Path) -> set[str]:
    """Types of zero points in the file: what the values on those scales are stored as."""
    model = onnx.load(path)
    assert model.opset_import[0].version == 21
    names = {TensorProto.INT8: "int8", TensorProto.INT16: "int16", TensorProto.INT4: "int4"}
    return {names[i.data_type] for i in model.graph.initializer if i.name.endswith("_zero_point")}


@pytest.mark.parametrize(("bias", "stored"), [(0.25, TensorProto.INT32), (40.0, TensorProto.FLOAT)])
def test_a_bias_that_int32_cannot_hold_is_stored_rounded_in_float(bias: float, stored: int) -> None:
    """On steps of 2^-15 * 2^-13 a bias of 40 would need 40 * 2^28 of them, five times what int32 holds."""
    graph = torch.fx.symbolic_trace(nn.Linear(2, 2)).graph
    zero = np.array(0, np.int32)
    source = TensorQuantization(QuantSpec(bits=16, symmetric=True), np.float32(2**-15), zero)
    weight = TensorQuantization(QuantSpec(axis=0), np.float32([2**-13, 2**-13]), np.zeros(2, np.int32))
    builder = Builder(21)
    stored_bias(builder, np.float32([bias, -bias]), next(iter(graph.nodes)), source, weight)
    kept = next(iter(builder.initializers.values()))
    assert kept.data_type == stored
    steps = onnx.numpy_helper.to_array(kept) * (2.0**-28 if stored == TensorProto.INT32 else 1.0)
    np.testing.assert_allclose(steps, [bias, -bias], rtol=1e-6)
