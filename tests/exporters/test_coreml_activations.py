"""coreml-int8 with activations in 8 bits: the plan's scales in the program, run by our executor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp.compress.ptq import Quantize
from edgecomp.compress.rules import Rule
from edgecomp.errors import ModelError
from edgecomp.exporters.coreml import CoreMLExporter
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.numerics.metrics import sqnr_db
from edgecomp.spec import Candidate, Data, TensorSpec
from tests.compress.test_ptq import Rows
from tests.exporters.test_coreml_export import candidate, export, opened


class Small(nn.Module):
    """Convolution, pooling, a residual addition, softmax, a linear layer: what networks are made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 2)
        x = x + nn.functional.relu6(self.body(x))
        return torch.softmax(self.head(x.mean((2, 3))) * 3, -1)


PICTURES = np.random.default_rng(0).standard_normal((12, 3, 8, 8)).astype(np.float32)


def quantized(**settings: object) -> Candidate:
    given = Candidate(Small().eval(), (TensorSpec("x", (1, 3, 8, 8)),))
    return Quantize(**settings)(given, Data(calibration=Rows(PICTURES)))  # type: ignore[arg-type]


def outputs(given: Candidate, path: Path, **settings: object) -> tuple[np.ndarray, np.ndarray]:
    """(package run by our executor, fake-quantized torch) on 12 pictures."""
    exporter = CoreMLExporter("coreml-int8", activations="int8", min_elements=1, **settings)  # type: ignore[arg-type]
    session = opened(export(exporter, given, path))
    torch_side = fake_quantize(given.module, given.quantization)
    pairs = [
        (session.run([PICTURES[i : i + 1]])[0], torch_side(torch.from_numpy(PICTURES[i : i + 1])).numpy())
        for i in range(len(PICTURES))
    ]
    return tuple(np.concatenate(side) for side in zip(*pairs, strict=True))  # type: ignore[return-value]


def test_float32_programs_compute_what_the_fake_quantized_graph_computes(tmp_path: Path) -> None:
    given = quantized()
    found, expected = outputs(given, tmp_path, compute_precision="float32")
    steps = np.rint(np.abs(found - expected) * 256)  # softmax has the scale 1/256
    assert (steps <= 1).mean() >= 0.99 and steps.max() <= 2


def test_float16_programs_stay_within_what_float16_rounds(tmp_path: Path) -> None:
    given = quantized()
    found, expected = outputs(given, tmp_path)
    assert sqnr_db(expected, found) > 30
    plain = given.original(torch.from_numpy(PICTURES)).detach().numpy()
    assert abs(sqnr_db(plain, found) - sqnr_db(plain, expected)) < 3


def test_the_program_has_the_plans_scales_and_integer_weights(tmp_path: Path) -> None:
    given = quantized()
    exporter = CoreMLExporter("coreml-int8", activations="int8", min_elements=1, compute_precision="float32")
    session = opened(export(exporter, given, tmp_path))
    program = session.package.main.operations
    constants = {o.outputs[0][0]: o.inputs["val"][0] for o in program if o.type == "const"}
    scales = {float(constants[o.inputs["scale"][0].value]) for o in program if o.type == "quantize"}
    planned = {float(q.scale) for n, q in given.quantization.activations.items() if q.spec.bits == 8}
    assert scales and scales <= planned
    assert float(given.quantization.activations["x"].scale) in scales
    integers = [o.inputs["data"][0] for o in program if o.type == "constexpr_blockwise_shift_scale"]
    kept = [q.values for q in given.quantization.weights.values()]
    assert len(integers) == len(kept) == 3
    assert all(any(np.array_equal(i, k) for k in kept) for i in integers)


def test_a_value_that_only_moves_is_rounded_once(tmp_path: Path) -> None:
    given = quantized()
    session = opened(export(CoreMLExporter("coreml-int8", activations="int8"), given, tmp_path))
    kinds = [o.type for o in session.package.main.operations]
    assert kinds.index("max_pool") < kinds.index("quantize", kinds.index("max_pool"))
    after = kinds[kinds.index("max_pool") + 1 :]
    assert after[: after.index("add")].count("quantize") == 1  # of relu6, not of the pooled value


def test_16_bit_values_stay_float_and_are_listed(tmp_path: Path) -> None:
    given = quantized(rules={"type:add": Rule(activation_bits=16)})
    artifact = export(CoreMLExporter("coreml-int8", activations="int8"), given, tmp_path)
    assert any("stays float: Core ML has no int16" in n for n in artifact.history[-1].notes)


def test_a_plan_of_activations_is_asked_for() -> None:
    exporter = CoreMLExporter("coreml-int8", activations="int8")
    plain = candidate(Small().eval(), 1, 3, 8, 8)
    (problem,) = exporter.problems(plain)
    assert problem.op == "quantize" and "--calib" in problem.reason
    with pytest.raises(ModelError, match="needs a quantized candidate"):
        exporter.export(plain, Data(), Path("never.mlpackage"))
    weights_alone = replace(quantized(), quantization=replace(quantized().quantization, activations={}))
    assert exporter.problems(weights_alone)[0].op == "quantize"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "coreml-pal4", "activations": "int8"}, "coreml-int8's setting, not coreml-pal4's"),
        ({"target": "coreml-int8", "activations": "int4"}, "expected float or int8"),
        (
            {"target": "coreml-int8", "activations": "int8", "minimum_deployment_target": "iOS16"},
            "needs iOS 17",
        ),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoreMLExporter(**settings)  # type: ignore[arg-type]
