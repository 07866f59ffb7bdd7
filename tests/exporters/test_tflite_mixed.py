"""Activations of 8 and 16 bits in one TFLite file, against the fake-quantized torch graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tflite_functions as functions
import torch
from ai_edge_litert import schema_py_generated as schema
from mixed_plans import mixed
from tflite_support import Functions, Many, direct, expected, export, op_types, quantized, run
from torch import nn

from edgecomp.errors import ModelError
from edgecomp.graph import fake_quant
from edgecomp.runtimes.litert import LiteRTSession
from edgecomp.spec import Candidate

FAMILIES = {
    "convolutions": functions.CONVOLUTIONS,
    "networks": functions.NETWORKS,
    "pools": {k: f for k, f in functions.POOLS.items() if "bilinear" not in k},  # coarse in 16 bits
    "activations": {k: f for k, f in functions.ACTIVATIONS.items() if k != "log softmax"},
    "arithmetic": functions.ARITHMETIC,
    "reductions": functions.REDUCTIONS,
}


@dataclass(frozen=True)
class Tolerance:
    """`narrow`: steps of an 8-bit output. 16 bits: all within `far` steps, all but `rare` within `near`."""

    narrow: int = 1
    near: int = 4
    far: int = 256
    rare: float = 0.02


# A value that rounds the other way in 8 bits moves what is computed from it by a hundred 16-bit steps. With
# 4-bit weights accumulators are small numbers, and the built-in kernels round them twice.
PLAIN, FOUR_BITS = Tolerance(), Tolerance(2, 40, 512, 0.15)


def check(
    made: Candidate, names: Functions, inputs: tuple[torch.Tensor, ...], folder: Path, allowed: Tolerance
) -> LiteRTSession:
    """The integers of every output are those of the fake-quantized torch graph, within a tolerance."""
    assert made.quantization is not None
    wanted = expected(fake_quant.fake_quantize(made.module, made.quantization), inputs)
    artifact = export(made, folder, "tflite-int8")
    for optimize in (False, True):
        opened = direct(artifact.path, optimize=optimize)
        for name, reference, real, spec in zip(
            names, wanted, run(opened, inputs), opened.outputs, strict=True
        ):
            off = np.abs(np.rint((real - reference) / (spec.scale or 1e-6)))
            assert off.max() <= (allowed.far if spec.dtype == "int16" else allowed.narrow), (name, optimize)
            assert (off > allowed.near).mean() <= allowed.rare, (name, optimize)
    return opened


CASES = [(family, 8) for family in FAMILIES] + [("convolutions", 4), ("networks", 4)]


@pytest.mark.parametrize(("family", "weight_bits"), CASES)
def test_mixed_file_computes_the_fake_quantized_graph(family: str, weight_bits: int, tmp_path: Path) -> None:
    picked = FAMILIES[family]
    whole = quantized(Many(picked), functions.PICTURE, weight_bits=weight_bits)
    for parity in (0, 1):
        made = mixed(whole, lambda n, p=parity: n % 2 == p)
        opened = check(made, picked, (functions.PICTURE,), tmp_path, PLAIN if weight_bits == 8 else FOUR_BITS)
        assert {"int8", "int16"} <= {p.dtype for p in opened.placement()}
        if family in ("convolutions", "networks", "activations"):
            assert "DEQUANTIZE" not in op_types(opened)
            assert "float32" not in {p.dtype for p in opened.placement()}


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_mixed_sequences(weight_bits: int, tmp_path: Path) -> None:
    whole = quantized(Many(functions.SEQUENCES), functions.SEQUENCE, weight_bits=weight_bits)
    for parity in (0, 1):
        made = mixed(whole, lambda n, p=parity: n % 2 == p)
        allowed = PLAIN if weight_bits == 8 else FOUR_BITS
        check(made, functions.SEQUENCES, (functions.SEQUENCE,), tmp_path, allowed)


@pytest.mark.parametrize("bits", [8, 16])
def test_four_bit_weights_take_half_a_byte_where_kernels_read_them(bits: int, tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.ConvTranspose2d(6, 5, 2, 2),
        nn.Flatten(), nn.Linear(320, 10),
    )  # fmt: skip
    made = quantized(net, functions.PICTURE, bits=bits, weight_bits=4)
    artifact = export(made, tmp_path, "tflite-int8" if bits == 8 else "tflite-int16x8")
    stored = {n: t for n, t in weight_types(artifact.path).items() if n.endswith("weight")}
    wide = {"1.weight", "2.weight"} if bits == 16 else {"2.weight"}
    assert {n for n, t in stored.items() if t != "int4"} == wide
    assert set(stored.values()) == {"int4", "int8"}
    check_plain = expected(fake_quant.fake_quantize(made.module, made.quantization), (functions.PICTURE,))
    for optimize in (False, True):
        opened = direct(artifact.path, optimize=optimize)
        real, step = run(opened, (functions.PICTURE,))[0], opened.outputs[0].scale or 0.0
        assert np.abs(real - check_plain[0]).max() <= (2.01 if bits == 8 else 40) * step


def weight_types(path: Path) -> dict[str, str]:
    """Constant of the file -> its TFLite type."""
    names = {v: k.lower() for k, v in vars(schema.TensorType).items() if not k.startswith("_")}
    graph = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0).subgraphs[0]
    return {t.name.decode(): names[t.type] for t in graph.tensors if t.buffer}


def test_a_border_is_one_quantize(tmp_path: Path) -> None:
    """conv (8) -> conv (16) -> conv (8): one QUANTIZE widens, one narrows, and nothing is float."""
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 3, 1))
    made = mixed(quantized(net, functions.PICTURE), lambda n: n == 2)
    opened = direct(export(made, tmp_path, "tflite-int8").path, optimize=True)
    assert op_types(opened) == ["CONV_2D", "QUANTIZE", "CONV_2D", "CONV_2D", "QUANTIZE"]
    assert [s.dtype for s in (*opened.inputs, *opened.outputs)] == ["int8", "int8"]


def test_narrowing_moves_few_values(tmp_path: Path) -> None:
    """A result of 16 bits narrowed to 8: LiteRT's QUANTIZE rounds twice, so single values end a step beside
    what one rounding gives. With 128 int16 steps to an int8 step 0.86 % of these do.
    """
    torch.manual_seed(3)
    picture = torch.randn(1, 4, 96, 96)
    net = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 8, 1))
    made = mixed(quantized(net, picture), lambda n: n == 1)
    assert made.quantization is not None
    wanted = expected(fake_quant.fake_quantize(made.module, made.quantization), (picture,))[0]
    opened = direct(export(made, tmp_path, "tflite-int8").path, optimize=False)
    assert op_types(opened) == ["QUANTIZE", "CONV_2D", "CONV_2D", "QUANTIZE"]
    steps = np.rint((run(opened, (picture,))[0] - wanted) / opened.outputs[0].scale)
    assert np.abs(steps).max() == 1 and (steps != 0).mean() < 0.006
    assert abs(steps.mean()) < 0.002


def test_a_plan_without_the_targets_own_width_is_refused(tmp_path: Path) -> None:
    made = mixed(quantized(nn.Conv2d(4, 6, 3), functions.PICTURE), lambda n: True)
    with pytest.raises(ModelError, match=r"activations of 8 bits .*, the plan has \[16\]"):
        export(made, tmp_path, "tflite-int8")
