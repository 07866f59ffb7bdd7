"""ONNX artifacts as files: QDQ equal to the fake-quantized graph, deterministic, described, refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_support import Function, Rows, candidate_of, export, normal, quantized
from torch import Tensor, nn

from edgecomp import door
from edgecomp.compress.ptq import Quantize
from edgecomp.errors import UnknownNameError, UnsupportedOpError
from edgecomp.exporters.onnx import OnnxExporter
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.runtimes.onnxruntime import OnnxRuntime
from edgecomp.spec import Candidate, Data, Preprocessing


class Mixed(nn.Module):
    """Convolutions of every kind, a concatenation with a sigmoid, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + nn.functional.relu6(self.depth(x))
        x = self.up(nn.functional.max_pool2d(x, 2))
        return self.head(torch.cat([x, torch.sigmoid(x)], 1).mean((2, 3)))


class Rows3(nn.Module):
    """Linear layers of rows, whose weight ONNX wants turned, attention and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


def pictures(count: int = 24) -> np.ndarray:
    return normal(count, 3, 16, 16).numpy()


@pytest.fixture(scope="module")
def mixed() -> Candidate:
    return quantized(Mixed(), pictures(), rounding="nearest", bias_correction="none")


def fake_outputs(candidate: Candidate, rows: np.ndarray) -> np.ndarray:
    graph_module = fake_quantize(candidate.module, candidate.quantization)
    with torch.no_grad():
        return np.concatenate([graph_module(torch.from_numpy(r[None])).numpy() for r in rows])


def test_qdq_equals_the_fake_quantized_graph(mixed: Candidate, tmp_path: Path) -> None:
    artifact = export(mixed, tmp_path / "m.onnx", "onnx-qdq")
    session = OnnxRuntime().open(artifact.path, optimize=False)
    found = door.run_float(session, [pictures()])[0]
    expected = fake_outputs(mixed, pictures())
    step = float(mixed.quantization.activations["linear"].scale)
    assert np.abs(found - expected).max() <= 1.01 * step
    assert np.mean(np.abs(found - expected) < 0.5 * step) > 0.98


def test_qdq_of_rows_equals_the_fake_quantized_graph(tmp_path: Path) -> None:
    rows = normal(16, 5, 8).numpy()
    candidate = quantized(Rows3(), rows, rounding="nearest")
    artifact = export(candidate, tmp_path / "m.onnx", "onnx-qdq")
    found = door.run_float(OnnxRuntime().open(artifact.path, optimize=False), [rows])[0]
    expected = fake_outputs(candidate, rows)
    noise = np.sum((found - expected) ** 2) / np.sum(expected**2)
    assert noise < 1e-3


def test_weights_and_biases_are_stored_as_integers(mixed: Candidate, tmp_path: Path) -> None:
    model = onnx.load(str(export(mixed, tmp_path / "m.onnx", "onnx-qdq").path))
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    for name, weight in mixed.quantization.weights.items():
        assert np.array_equal(stored[f"{name}_quantized"], weight.values)
        assert np.array_equal(stored[f"{name}_scale"], weight.scale)
    biases = [v for n, v in stored.items() if n.endswith("_bias_quantized")]
    assert len(biases) == 4 and all(v.dtype == np.int32 for v in biases)
    large = [n for n, v in stored.items() if v.dtype == np.float32 and v.size > 8]
    assert large == []


def test_the_same_candidate_gives_the_same_bytes(mixed: Candidate, tmp_path: Path) -> None:
    first = export(mixed, tmp_path / "a.onnx", "onnx-qdq")
    second = export(mixed, tmp_path / "b.onnx", "onnx-qdq")
    assert first.sha256 == second.sha256
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.size_bytes == first.path.stat().st_size


def test_the_file_describes_itself(mixed: Candidate, tmp_path: Path) -> None:
    preprocessing = Preprocessing(size=(16, 16))
    source = Rows((pictures(4),), ("cat", "dog"), preprocessing)
    OnnxExporter("onnx-qdq", ("scores",)).export(mixed, Data(calibration=source), tmp_path / "m.onnx")
    model = onnx.load(str(tmp_path / "m.onnx"))
    facts = json.loads({p.key: p.value for p in model.metadata_props}["edgecomp"])
    assert facts["target"] == "onnx-qdq" and facts["format"] == "onnx"
    assert facts["labels"] == ["cat", "dog"]
    assert Preprocessing.from_json(facts["preprocessing"]) == preprocessing
    assert facts["inputs"][0]["shape"] == [1, 3, 16, 16] and facts["inputs"][0]["dtype"] == "float32"
    assert [o["name"] for o in facts["outputs"]] == ["scores"] == [o.name for o in model.graph.output]
    assert [r["kind"] for r in facts["history"]] == ["quantize"]


def test_a_dead_filter_keeps_its_bias(tmp_path: Path) -> None:
    """A filter of zeros with bias 3.0 gives 3.0: its scale is raised until the bias fits int32."""
    module = nn.Conv2d(2, 2, 1)
    with torch.no_grad():
        module.weight[0] = 0.0
        module.weight[1] = 1.0
        module.bias.copy_(torch.tensor([3.0, 0.0]))
    rows = normal(8, 2, 4, 4).numpy()
    candidate = quantized(module, rows, rounding="nearest")
    artifact = export(candidate, tmp_path / "m.onnx", "onnx-qdq")
    found = OnnxRuntime().open(artifact.path, optimize=False).run([rows[:1]])[0]
    step = float(candidate.quantization.activations["conv2d"].scale)
    np.testing.assert_allclose(found[0, 0], 3.0, atol=0.5 * step + 1e-6)


def test_16_bit_activations(tmp_path: Path) -> None:
    candidate = quantized(Mixed(), pictures(), activation_bits=16, rounding="nearest")
    artifact = export(candidate, tmp_path / "m.onnx", "onnx-qdq")
    model = onnx.load(str(artifact.path))
    assert model.opset_import[0].version == 21
    found = door.run_float(OnnxRuntime().open(artifact.path, optimize=False), [pictures(4)])[0]
    np.testing.assert_allclose(found, fake_outputs(candidate, pictures(4)), atol=5e-4)


def test_excluded_layers_stay_float_and_are_listed(tmp_path: Path) -> None:
    candidate = quantized(Mixed(), pictures(), exclude=("stem",), rounding="nearest")
    artifact = export(candidate, tmp_path / "m.onnx", "onnx-qdq")
    assert [(p.op, p.module) for p in artifact.skipped] == [("aten.conv2d.default", "stem")]
    stored = {i.name for i in onnx.load(str(artifact.path)).graph.initializer}
    assert "stem.weight" in stored and "stem.weight_quantized" not in stored
    found = door.run_float(OnnxRuntime().open(artifact.path, optimize=False), [pictures(4)])[0]
    np.testing.assert_allclose(found, fake_outputs(candidate, pictures(4)), atol=0.05)


def test_several_inputs_and_outputs_keep_their_order(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x - y, y * 2, x

    x, y = normal(1, 4), normal(1, 4, seed=1)
    artifact = export(candidate_of(Two(), x, y), tmp_path / "m.onnx")
    assert [o.name for o in artifact.outputs] == ["output_0", "output_1", "output_2"]
    found = OnnxRuntime().open(artifact.path).run([x.numpy(), y.numpy()])
    for result, expected in zip(found, (x - y, y * 2, x), strict=True):
        np.testing.assert_allclose(result, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", ["relu", "output", "linear", "weight", "relu.1", "constant.1"])
def test_names_of_the_user_do_not_meet_names_of_the_graph(name: str, tmp_path: Path) -> None:
    """A parameter or an input may be called as a node is, or as a made-up value is."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(normal(4, 4)), nn.Parameter(normal(4))
            self.relu = nn.Parameter(normal(4))
            self.output = nn.Parameter(normal(4))
            self.constant = nn.ParameterList([normal(4), normal(4)])

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(nn.functional.linear(x, self.weight, self.bias) * self.relu)
            return torch.relu(x.reshape(2, 2).reshape(1, 4) - self.constant[1]) + self.output

    x = normal(1, 4)
    candidate = candidate_of(Net(), x)
    renamed = Candidate(candidate.module, (type(candidate.inputs[0])(name, (1, 4)),))
    artifact = export(renamed, tmp_path / "m.onnx")
    (found,) = OnnxRuntime().open(artifact.path, optimize=False).run([x.numpy()])
    np.testing.assert_allclose(found, Net.forward(candidate.module, x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_model_without_a_plan_is_refused_before_any_work(tmp_path: Path) -> None:
    candidate = candidate_of(Function(torch.relu), normal(1, 4))
    with pytest.raises(UnsupportedOpError, match=r"no quantization plan: quantize it first"):
        export(candidate, tmp_path / "m.onnx", "onnx-qdq")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'onnx-qdq'"):
        OnnxExporter("onnx-qqd")


def test_module_names_travel_as_documentation(mixed: Candidate, tmp_path: Path) -> None:
    model = onnx.load(str(export(mixed, tmp_path / "m.onnx", "onnx-qdq").path))
    assert {n.doc_string for n in model.graph.node if n.op_type == "Conv"} == {"stem", "depth"}


def test_a_float_target_of_a_quantized_candidate_is_the_float_graph(mixed: Candidate, tmp_path: Path) -> None:
    artifact = export(mixed, tmp_path / "m.onnx")
    found = door.run_float(OnnxRuntime().open(artifact.path, optimize=False), [pictures(2)])[0]
    with torch.no_grad():
        expected = Mixed().eval()(torch.from_numpy(pictures(2))).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_integer_inputs_have_no_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 3)).eval()
    tokens = torch.tensor([[1, 9, 4]])
    candidate = Quantize(rounding="nearest")(
        candidate_of(module, tokens), Data(calibration=Rows((np.arange(9).reshape(3, 3),)))
    )
    artifact = export(candidate, tmp_path / "m.onnx", "onnx-qdq")
    assert artifact.inputs[0].dtype == "int64" and artifact.inputs[0].scale is None
    (found,) = OnnxRuntime().open(artifact.path, optimize=False).run([tokens.numpy()])
    with torch.no_grad():
        expected = fake_quantize(candidate.module, candidate.quantization)(tokens).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
