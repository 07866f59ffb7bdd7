"""Convolutions and pools of any geometry: float and int8, against torch and the fake-quantized graph."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tflite_support import Many, candidate, direct, expected, export, quantized, run, sqnr_db
from torch import nn

from edgecomp.exporters.tflite_conv import same_padding
from edgecomp.graph import fake_quant


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    groups = draw(st.sampled_from([1, 2, 4]))
    per_group, out_per_group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 3)]))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = draw(st.sampled_from([1, 1, 2]))
    spans = [dilation * (k - 1) + 1 for k in kernel]
    padding = (draw(st.integers(0, min(2, spans[0] - 1))), draw(st.integers(0, min(2, spans[1] - 1))))
    stride = draw(st.integers(1, 3))
    size = [max(s - 2 * p, 1) + draw(st.integers(0, 6)) for s, p in zip(spans, padding, strict=True)]
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = nn.Conv2d(
        groups * per_group,
        groups * out_per_group,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
    )
    return layer, (1, groups * per_group, *size)


@settings(max_examples=25, deadline=None)
@given(convolutions())
def test_convolution_of_any_geometry(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    x = torch.randn(shape)
    made = quantized(layer, x)
    assert made.quantization is not None
    wanted = {
        "tflite-fp32": expected(layer, (x,))[0],
        "tflite-int8": expected(fake_quant.fake_quantize(made.module, made.quantization), (x,))[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        for target, reference in wanted.items():
            chosen = made if target == "tflite-int8" else candidate(layer, x)
            artifact = export(chosen, Path(folder), target)
            for optimize in (True, False):
                found = run(direct(artifact.path, optimize=optimize), (x,))[0]
                if target == "tflite-fp32":
                    assert sqnr_db(reference, found) > 100
                else:
                    scale = artifact.outputs[0].scale
                    assert scale is not None
                    assert np.abs(np.rint((found - reference) / scale)).max() <= 1


@st.composite
def transposed(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    groups, stride, kernel = draw(st.sampled_from([1, 2])), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    padding = draw(st.integers(0, kernel - 1))
    extra = draw(st.integers(0, min(stride - 1, padding)))
    size = draw(st.integers(2, 5))
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = nn.ConvTranspose2d(2 * groups, 3 * groups, kernel, stride, padding, extra, groups)
    full = (size - 1) * stride - 2 * padding + kernel + extra
    return (layer if full > 0 else nn.ConvTranspose2d(2 * groups, 3, kernel, stride)), (
        1,
        2 * groups,
        size,
        size,
    )


@settings(max_examples=15, deadline=None)
@given(transposed())
def test_transposed_convolution_of_any_geometry(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    x = torch.randn(shape)
    with tempfile.TemporaryDirectory() as folder:
        artifact = export(candidate(layer, x), Path(folder), "tflite-fp32")
        for optimize in (True, False):
            found = run(direct(artifact.path, optimize=optimize), (x,))[0]
            assert sqnr_db(expected(layer, (x,))[0], found) > 100


@settings(max_examples=15, deadline=None)
@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    size=st.integers(4, 9),
    ceil=st.booleans(),
    data=st.data(),
)
def test_pools_of_any_geometry(kernel: int, stride: int, size: int, ceil: bool, data: st.DataObject) -> None:
    padding = data.draw(st.integers(0, kernel // 2))
    pools = {
        "max": lambda x: F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil),
        "mean": lambda x: F.avg_pool2d(x, kernel, stride, padding),
    }
    x = torch.randn(1, 3, size, size)
    module = Many(pools)
    with tempfile.TemporaryDirectory() as folder:
        artifact = export(candidate(module, x), Path(folder), "tflite-fp32")
        found = run(direct(artifact.path, optimize=True), (x,))
        for reference, real in zip(expected(module, (x,)), found, strict=True):
            assert sqnr_db(reference, real) > 100


def test_same_padding_by_hand() -> None:
    """From TensorFlow's definition: ceil(n / s) outputs, the odd pixel at the end."""
    assert same_padding(224, 3, 2, 1) == (0, 1)
    assert same_padding(7, 3, 1, 1) == (1, 1)
    assert same_padding(8, 3, 1, 2) == (2, 2)
    assert same_padding(9, 1, 2, 1) == (0, 0)
