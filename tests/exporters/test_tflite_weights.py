"""Storage of weights in the targets with float activations, and 4-bit weights in integer ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tflite_support import (
    RUNTIME,
    calibration,
    candidate,
    check_float,
    expected,
    export,
    op_types,
    quantized,
    run,
    sqnr_db,
)
from torch import nn

from edgecomp.compress.ptq import Quantize
from edgecomp.errors import InputError
from edgecomp.exporters import tflite_weights
from edgecomp.exporters.tflite import TFLiteExporter
from edgecomp.graph import fake_quant
from edgecomp.spec import Candidate, Data, QuantizationPlan, QuantSpec, TensorQuantization

PICTURE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1))


def _layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "conv": nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU()),
        "depthwise": nn.Conv2d(4, 8, 3, groups=4),
        "groups": nn.Conv2d(4, 16, 3, groups=2),
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.ReLU()),
        "transposed": nn.ConvTranspose2d(4, 6, 3, 2, 1),
    }


@pytest.mark.parametrize(
    ("target", "db"), [("tflite-fp16", 60.0), ("tflite-dynamic", 35.0), ("tflite-int4", 14.0)]
)
def test_noise_is_that_of_the_storage(target: str, db: float, tmp_path: Path) -> None:
    """About 6 dB a bit of weight or activation: 11, 8 and 4 bits."""
    check_float(_layers(), (PICTURE,), tmp_path, target=target, db=db)


def test_sizes_follow_the_bits(tmp_path: Path) -> None:
    """A linear layer of 64 x 512 weights: 4, 2, 1 bytes, and half a byte plus 2 bytes for each 32."""
    made = candidate(nn.Linear(64, 512, bias=False), ROWS)
    rest = 4096  # names, metadata, tables
    sizes = {
        t: export(made, tmp_path, t).size_bytes
        for t in ("tflite-fp32", "tflite-fp16", "tflite-dynamic", "tflite-int4")
    }
    weights = 64 * 512
    assert 4 * weights <= sizes["tflite-fp32"] < 4 * weights + rest
    assert 2 * weights <= sizes["tflite-fp16"] < 2 * weights + rest
    assert weights <= sizes["tflite-dynamic"] < weights + 512 * (4 + 8) + rest
    assert weights // 2 + weights // 16 <= sizes["tflite-int4"] < weights // 2 + weights // 16 + rest


def test_embeddings_are_stored_as_bytes_and_restored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    table, ids = nn.Embedding(50, 16), torch.tensor([[3, 0, 49, 7]])
    opened = check_float({"table": table}, (ids,), tmp_path, target="tflite-dynamic", db=35.0)
    assert op_types(opened) == ["GATHER", "GATHER", "CAST", "MUL"]


def test_blocks_by_hand() -> None:
    """Two outputs of 32 inputs in one block each: scale = largest / 7, rounded up to float16."""
    weight = np.zeros((2, 32), np.float32)
    weight[0, :3] = [7.0, -3.4, 0.6]
    weight[1, 0] = 0.1
    found = tflite_weights.in_blocks("w", weight, 32)
    assert found.scale is not None
    np.testing.assert_array_equal(found.values[0, :4], [7, -3, 1, 0])
    assert found.scale[0, 0] == 1.0
    exact = np.float32(0.1) / 7
    assert exact <= found.scale[1, 0] == np.float32(np.float16(found.scale[1, 0])) < exact * (1 + 2**-10)
    assert found.values[1, 0] == 7


@given(arrays.arrays(np.float32, (3, 64), elements=st.floats(-100, 100, width=32)))
def test_blocks_err_by_half_a_step_at_most(weight: np.ndarray) -> None:
    found = tflite_weights.in_blocks("w", weight, 32)
    assert found.scale is not None
    step = np.repeat(found.scale, 32, axis=1)
    assert np.abs(found.values).max() <= 7
    assert (np.abs(found.values * step - weight) <= step / 2 * 1.0001).all()


def _by_hand(layer: nn.Linear, group: int) -> np.ndarray:
    """x @ W' with W rounded to 4 bits in groups, in float64."""
    weight = layer.weight.detach().numpy().astype(np.float64)
    parts = weight.reshape(weight.shape[0], -1, group)
    scale = np.abs(parts).max(-1, keepdims=True) / 7
    rounded = (np.rint(parts / scale) * scale).reshape(weight.shape)
    return ROWS.numpy() @ rounded.T + layer.bias.detach().numpy()


@pytest.mark.parametrize("group", [32, 64])
def test_block_wise_four_bits_are_computed_as_such(group: int, tmp_path: Path) -> None:
    """Far closer to the rounded weights than to the float ones: what is left is the 8-bit activation."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    artifact = export(candidate(layer, ROWS), tmp_path, "tflite-int4", group_size=group)
    assert artifact.skipped == ()
    for optimize in (False, True):
        found = run(RUNTIME.open(artifact.path, optimize=optimize), (ROWS,))[0]
        assert sqnr_db(_by_hand(layer, group), found) > 35
        assert 15 < sqnr_db(expected(layer, (ROWS,))[0], found) < 28


def test_layers_that_keep_8_bits_are_listed(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Flatten(), nn.Linear(576, 8))
    artifact = export(candidate(layers, PICTURE), tmp_path, "tflite-int4")
    assert [(p.op, p.module) for p in artifact.skipped] == [("aten.conv2d.default", "0")]
    with pytest.raises(InputError, match="group_size is 24; LiteRT takes multiples of 32"):
        TFLiteExporter("tflite-int4", group_size=24)


def _four_bits(module: nn.Module, x: torch.Tensor) -> Candidate:
    return Quantize(rounding="nearest", weight_bits=4)(
        candidate(module, x), Data(calibration=calibration((x,)))
    )


def test_four_bit_weights_of_the_plan_in_an_integer_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 8),
    )
    made = _four_bits(net, PICTURE)
    plan = made.quantization
    assert plan is not None
    wanted = expected(fake_quant.fake_quantize(made.module, plan), (PICTURE,))[0]
    artifact = export(made, tmp_path, "tflite-int8")
    graph = schema.Model.GetRootAs(artifact.path.read_bytes(), 0).Subgraphs(0)
    types = {graph.Tensors(i).Name().decode(): graph.Tensors(i).Type() for i in range(graph.TensorsLength())}
    assert {types[name] for name in plan.weights} == {schema.TensorType.INT4}
    step = artifact.outputs[0].scale
    assert step is not None
    for optimize in (False, True):
        opened = RUNTIME.open(artifact.path, optimize=optimize)
        assert np.abs(np.rint((run(opened, (PICTURE,))[0] - wanted) / step)).max() <= 1


def test_a_weight_only_file_takes_the_integers_of_the_plan(tmp_path: Path) -> None:
    """Rounding is decided once: what GPTQ or training chose is what the file holds."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    made = quantized(layer, ROWS)
    plan = made.quantization
    assert plan is not None
    name, weight = next(iter(plan.weights.items()))
    assert weight.values is not None
    odd = replace(weight, values=np.clip(weight.values + 1, -127, 127).astype(np.int8))
    changed = replace(made, quantization=QuantizationPlan(plan.activations, {name: odd}))
    artifact = export(changed, tmp_path, "tflite-dynamic")
    found = run(RUNTIME.open(artifact.path), (ROWS,))[0]
    assert odd.values is not None
    shifted = odd.values * odd.scale.reshape(-1, 1)
    wanted = ROWS.numpy() @ shifted.T + layer.bias.detach().numpy()
    assert sqnr_db(wanted, found) > 35


def test_groups_of_the_plan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    made = quantized(layer, ROWS)
    plan = made.quantization
    assert plan is not None
    name = next(iter(plan.weights))
    values = np.random.default_rng(0).integers(-7, 8, (48, 64)).astype(np.int8)
    scale = np.random.default_rng(1).uniform(0.01, 0.02, (48, 2)).astype(np.float16).astype(np.float32)
    spec = QuantSpec(4, True, 0, 32, narrow=True)
    groups = TensorQuantization(spec, scale, np.zeros((48, 2), np.int32), values)
    changed = replace(made, quantization=QuantizationPlan({}, {name: groups}))
    found = run(RUNTIME.open(export(changed, tmp_path, "tflite-int4").path), (ROWS,))[0]
    wanted = ROWS.numpy() @ (values * np.repeat(scale, 32, 1)).T + layer.bias.detach().numpy()
    assert sqnr_db(wanted, found) > 35


def test_excluded_layers_keep_float_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    made = quantized(net, ROWS, exclude=("0",))
    artifact = export(made, tmp_path, "tflite-dynamic")
    details = RUNTIME.open(artifact.path)._interpreter.get_tensor_details()
    dtypes = {t["name"]: np.dtype(t["dtype"]).name for t in details if t["name"].endswith("weight")}
    assert sorted(dtypes.values()) == ["float32", "int8"]
