"""The QDQ file for TensorRT: its numbers, where Q/DQ stand, and the rules checked without a board."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from mixed_plans import mixed
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx_support import export, normal, quantized
from torch import Tensor, nn

from edgecomp import door, registry
from edgecomp.errors import UnsupportedOpError
from edgecomp.exporters import onnx_tensorrt_rules as rules
from edgecomp.exporters.onnx_tensorrt import TensorRTExporter, symmetric
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.runtimes.onnxruntime import OnnxRuntime
from edgecomp.spec import Candidate, Data


class Residual(nn.Module):
    """A stem, a residual block, a transposed convolution, attention-like products and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2, 2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.inner(x) + x)
        x = torch.nn.functional.hardswish(self.up(nn.functional.avg_pool2d(x, 2)))
        rows = x.flatten(2)
        x = (rows @ rows.transpose(1, 2)).softmax(-1).mean(2)
        return self.head(x)


PICTURES = normal(24, 3, 16, 16).numpy()


@pytest.fixture(scope="module")
def residual() -> Candidate:
    return quantized(Residual(), PICTURES, rounding="nearest")


def written(candidate: Candidate, folder: Path) -> ModelProto:
    artifact = TensorRTExporter().export(candidate, Data(), folder / "m.onnx")
    return onnx.load(artifact.path)


def test_file_computes_the_symmetric_fake_quantized_graph(residual: Candidate, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    artifact = TensorRTExporter().export(residual, Data(), path)
    assert (artifact.format, artifact.target) == ("tensorrt", "tensorrt-int8")
    found = door.run_float(OnnxRuntime().open(path, optimize=False), [PICTURES])[0]
    plan = symmetric(residual.module, residual.quantization)
    graph_module = fake_quantize(residual.module, plan)
    with torch.no_grad():
        expected = torch.cat([graph_module(torch.from_numpy(r[None])) for r in PICTURES]).numpy()
        real = residual.original(torch.from_numpy(PICTURES)).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)
    noise = ((found - real) ** 2).sum() / (real**2).sum()
    assert noise < 10**-2, "20 dB"


def test_zero_points_are_zero_and_everything_is_int8(residual: Candidate, tmp_path: Path) -> None:
    model = written(residual, tmp_path)
    constants = {i.name: i for i in model.graph.initializer}
    zeros = [
        constants[n.input[2]] for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert zeros and all(z.data_type == TensorProto.INT8 for z in zeros)
    assert not any(numpy_helper.to_array(z).any() for z in zeros)
    assert {i.data_type for i in constants.values()} <= {
        TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT64
    }  # fmt: skip
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            assert constants[node.input[2]].data_type == TensorProto.FLOAT, "the bias is float"


def test_pairs_stand_only_where_an_int8_kernel_reads(residual: Candidate, tmp_path: Path) -> None:
    """Not on the convolution that the addition fuses with, nor before softmax, nor at the output."""
    model = written(residual, tmp_path)
    makers = {o: n for n in model.graph.node for o in n.output}
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            if name in makers and makers[name].op_type == "DequantizeLinear" and name in readers_of(model):
                readers.setdefault(makers[name].input[0], []).append(node.op_type)
    kinds = sorted({k for found in readers.values() for k in found})
    assert kinds == ["Add", "AveragePool", "Conv", "ConvTranspose", "Gemm", "MatMul", "Transpose"]
    addition = next(n for n in model.graph.node if n.op_type == "Add")
    assert sorted(makers[i].op_type for i in addition.input) == ["Conv", "DequantizeLinear"]


def readers_of(model: ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.input}


def test_symmetric_scale_is_the_larger_end_over_127(residual: Candidate) -> None:
    plan, kept = residual.quantization, symmetric(residual.module, residual.quantization).activations
    assert set(kept) < set(plan.activations)
    for name, q in kept.items():
        before = plan.activations[name]
        ends = np.array([-128.0, 127.0]) - float(before.zero_point)
        assert float(q.scale) == pytest.approx(np.abs(ends).max() * float(before.scale) / 127)
        assert int(q.zero_point) == 0
    assert all(
        plan.weights[n] is q for n, q in symmetric(residual.module, residual.quantization).weights.items()
    )


def test_a_plan_with_16_bits_is_refused() -> None:
    candidate = quantized(nn.Conv2d(3, 4, 3), PICTURES, rounding="nearest")
    found = TensorRTExporter().problems(mixed(candidate, lambda n: True))
    assert [p.reason for p in found] == [
        "TensorRT has no activations of 16 bits; quantize with activation_bits=8"
    ]


def test_a_convolution_with_a_computed_weight_stays_float(tmp_path: Path) -> None:
    """TensorRT has no int8 kernel for it: neither of its inputs is rounded."""

    class Computed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, x.mean((2, 3)).reshape(1, 3, 1, 1))

    candidate = quantized(Computed(), PICTURES, rounding="nearest")
    assert TensorRTExporter().problems(candidate) == []
    assert [n.op_type for n in written(candidate, tmp_path).graph.node if "Linear" in n.op_type] == []


def test_targets_and_suffix_are_registered() -> None:
    made = registry.load("exporters", "tensorrt-int8")()
    assert made.suffix == ".onnx" and registry.entry("exporters", "tensorrt-int8").extra == "onnx"


# The rules, one broken at a time in a file that keeps them.


def sound() -> ModelProto:
    """x -> Q -> DQ -> Conv(weight behind DQ, float bias) -> y."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w8", "ws", "wz"], ["w"], axis=0),
        helper.make_node("Conv", ["d", "w", "b"], ["y"], doc_string="stem"),
    ]
    constants = {
        "s": np.float32(0.1), "z": np.int8(0), "w8": np.ones((2, 3, 1, 1), np.int8),
        "ws": np.float32([0.1, 0.2]), "wz": np.zeros(2, np.int8), "b": np.zeros(2, np.float32),
        "u": np.uint8(0), "i32": np.zeros(2, np.int32), "z32": np.zeros(2, np.int32),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def change(name: str, value: np.ndarray) -> Callable[[ModelProto], None]:
    def apply(model: ModelProto) -> None:
        for constant in model.graph.initializer:
            if constant.name == name:
                constant.CopyFrom(numpy_helper.from_array(np.asarray(value), name))

    return apply


def rewire(index: int, position: int, name: str) -> Callable[[ModelProto], None]:
    def apply(model: ModelProto) -> None:
        model.graph.node[index].input[position] = name

    return apply


def add(node: NodeProto) -> Callable[[ModelProto], None]:
    def apply(model: ModelProto) -> None:
        model.graph.node.append(node)

    return apply


def other_axis(model: ModelProto) -> None:
    model.graph.node[2].attribute[0].i = 1
    change("ws", np.float32([0.1, 0.2, 0.3]))(model)
    change("wz", np.zeros(3, np.int8))(model)


def other_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 21


def without_zero(model: ModelProto) -> None:
    del model.graph.node[0].input[2]


BROKEN = {
    "its zero point is 3; TensorRT quantizes symmetrically": change("z", np.int8(3)),
    "quantizes to UINT8": change("z", np.uint8(0)),
    "no zero point, so ONNX makes it uint8": without_zero,
    "its scale is float32, smallest 0.0; TensorRT wants positive": change("s", np.float32(0.0)),
    "its scale is float64": change("s", np.float64(0.1)),
    "3 scales for an activation": change("s", np.float32([0.1, 0.2, 0.3])),
    "its scale is computed": rewire(0, 1, "x"),
    "its zero point is computed": rewire(0, 2, "x"),
    "2 zero points for 1 scales": change("z", np.zeros(2, np.int8)),
    "its weight is float and the other quantized": rewire(3, 1, "b"),
    "its input is float and the other quantized": rewire(3, 0, "x"),
    "its bias is computed": rewire(3, 2, "d"),
    "scales along axis 1; output channels lie on axis 0": other_axis,
    "it restores INT32; TensorRT restores INT8": rewire(2, 0, "i32"),
    "its integers go to Relu": add(helper.make_node("Relu", ["q"], ["r"])),
    "it restores integers that no QuantizeLinear made": rewire(1, 0, "x"),
    "not among the operations": add(helper.make_node("QLinearConv", ["q"], ["r"])),
    "opset 21; TensorRT 8.5 reads 9 to 17": other_opset,
}


def test_a_file_that_keeps_the_rules_has_no_problems() -> None:
    assert rules.problems(sound()) == []


@pytest.mark.parametrize("reason", BROKEN)
def test_each_broken_rule_is_named(reason: str) -> None:
    model = sound()
    BROKEN[reason](model)
    found = rules.problems(model)
    assert any(reason in p.reason for p in found), found
    assert all(p.module == ("stem" if p.op == "Conv" else "") for p in found)


def test_an_ordinary_qdq_file_breaks_them(residual: Candidate, tmp_path: Path) -> None:
    """TFLite's scheme: zero points, and biases in int32."""
    export(residual, tmp_path / "q.onnx", "onnx-qdq")
    reasons = " ".join(p.reason for p in rules.problems(onnx.load(tmp_path / "q.onnx")))
    assert "its zero point is" in reasons and "its bias is computed" in reasons and "INT32" in reasons


def test_a_broken_rule_stops_the_export(
    residual: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "HIGHEST_OPSET", 13)
    with pytest.raises(UnsupportedOpError, match="opset in the model: opset 17; TensorRT 8.5 reads 9 to 13"):
        TensorRTExporter().export(residual, Data(), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
