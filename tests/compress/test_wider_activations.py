"""Squares of normalization layers in one accumulator, and 16 bits for the values whose 8 cost most."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp.compress import calibrate, norms, observe, plan, sensitivity, wider
from edgecomp.compress.ptq import Quantize
from edgecomp.compress.rules import Rule
from edgecomp.errors import InputError
from edgecomp.graph import capture
from edgecomp.graph.batch import with_batch
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.spec import Candidate, Data, QuantizationPlan, TensorSpec
from tests.compress.test_ptq import Rows

aten = torch.ops.aten


class Outlier(nn.Module):
    """A token with one value of 200 among tokens of 0.5, normalized: MiniLM's residual stream in small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def rows(count: int) -> Rows:
    x = np.random.default_rng(0).standard_normal((count, 6, 32)).astype(np.float32) * 0.5
    x[:, 0, 3] = 200.0
    return Rows(x)


def targets(graph_module: torch.fx.GraphModule) -> list[object]:
    return [n.target for n in graph_module.graph.nodes]


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.LayerNorm(12), (1, 5, 12)), (nn.LayerNorm((5, 12)), (1, 3, 5, 12)), (nn.RMSNorm(12), (1, 5, 12))],
    ids=["last axis", "two axes", "root mean square"],
)
def test_squares_become_a_product_and_the_function_stays(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + 1
    graph_module = capture(module, (x,))
    assert norms.accumulate_squares(graph_module) == 1
    assert aten.matmul.default in targets(graph_module)
    graph_module.graph.lint()
    torch.testing.assert_close(graph_module(x), module(x), rtol=1e-5, atol=1e-5)
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target is not aten.reshape.default:
            assert isinstance(node.meta["val"], Tensor)
    wide = with_batch(graph_module, 3)
    assert wide is not None
    three = torch.cat([x, x * 2, x - 1])
    torch.testing.assert_close(wide(three), module(three), rtol=1e-5, atol=1e-5)


class Others(nn.Module):
    """Means that are no sums of squares of trailing axes."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        squares = x * x
        return squares.mean(1, keepdim=True), (x * (x + 1)).mean(-1), squares.mean(-1)


def test_other_means_are_left_alone() -> None:
    graph_module = capture(Others(), (torch.randn(1, 4, 6),))
    assert norms.accumulate_squares(graph_module) == 0


def test_a_square_that_16_bits_lose_survives_in_the_accumulator() -> None:
    """32 squares up to 40,000 on an int16 scale have steps of 1.2: those of 0.25 vanish before the mean."""
    source = rows(8)
    x = torch.from_numpy(source.values[:1])
    graph_module = capture(Outlier().eval(), (x,))
    errors = []
    for rewrite in (False, True):
        if rewrite:
            norms.accumulate_squares(graph_module)
        found = calibrate.calibrate(graph_module, source, 8, 16, observe.ObserverSettings("minmax"))
        decided = calibrate.activations(graph_module, found, 16)
        rounded = fake_quantize(graph_module, QuantizationPlan(decided, {}, {}))(x)
        errors.append(float((rounded - graph_module(x))[0, 1:].abs().max()))
    assert errors[0] > 8 * errors[1]


def test_the_fewest_values_are_widened_until_the_noise_is_low_enough() -> None:
    source = rows(8)
    given = Candidate(Outlier().eval(), (TensorSpec("x", (1, 6, 32)),))
    plain = Quantize(rounding="nearest")(given, Data(calibration=source))
    found = Quantize(rounding="nearest", activation_sqnr_db=30.0)(given, Data(calibration=source))
    widths = {n: q.spec.bits for n, q in found.quantization.activations.items()}
    assert set(widths.values()) == {8, 16}
    assert widths["x"] == 8 and widths["linear"] == 8
    notes = [n for n in found.history[-1].notes if "16-bit" in n or "alone with 8 bits" in n]
    assert notes[0].startswith(f"16-bit activations in {len(notes) - 1} places")
    wide = {n.split(" in ")[0] for n in notes[1:]}
    assert wide <= {n for n, bits in widths.items() if bits == 16}
    noise = []
    for each in (plain, found):
        quiet = QuantizationPlan(each.quantization.activations, {}, each.quantization.float_nodes)
        x = torch.from_numpy(source.values[:1])
        error = fake_quantize(each.module, quiet)(x) - each.module(x)
        noise.append(float(error.square().sum()))
    assert noise[1] < noise[0]


def test_nothing_is_widened_where_8_bits_manage() -> None:
    given = Candidate(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), (TensorSpec("x", (1, 4)),))
    data = Data(calibration=Rows(np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)))
    found = Quantize(activation_sqnr_db=15.0)(given, data)
    assert {q.spec.bits for q in found.quantization.activations.values()} == {8}
    assert not any("16-bit" in n for n in found.history[-1].notes)


def test_a_rule_wins_over_the_choice() -> None:
    given = Candidate(Outlier().eval(), (TensorSpec("x", (1, 6, 32)),))
    step = Quantize(activation_sqnr_db=60.0, rounding="nearest", rules={"norm": Rule(activation_bits=8)})
    found = step(given, Data(calibration=rows(8)))
    assert {q.spec.bits for q in found.quantization.activations.values()} == {8}


def test_doors_stay_and_what_is_out_of_reach_widens_all_else() -> None:
    graph_module = capture(Outlier().eval(), (torch.zeros(1, 6, 32),))
    inside = sensitivity.Sensitivity("activation", "mul", "norm", ("mul",), 8, 1, 0.5)
    door = sensitivity.Sensitivity("activation", "x", "", ("x",), 8, 1, 0.4)
    result = sensitivity.Sensitivity("activation", "linear", "head", ("linear",), 8, 1, 0.3)
    weight = sensitivity.Sensitivity("weight", "head.weight", "head", ("linear",), 8, 1, 9.0)
    assert wider.choose(graph_module, [inside, door, result, weight], 0.0) == [inside]
    assert wider.choose(graph_module, [inside, door, result, weight], 1.3) == []


@pytest.mark.parametrize("value", [0.0, -3.0, 81.0])
def test_a_figure_that_makes_no_sense_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="activation_sqnr_db is"):
        Quantize(activation_sqnr_db=value)


def test_16_bits_take_the_range_that_was_clipped_for_8() -> None:
    source = rows(8)
    graph_module = capture(nn.Sequential(nn.Tanhshrink(), nn.Linear(32, 4)).eval(), (torch.zeros(1, 6, 32),))
    groups = calibrate.calibrate(graph_module, source, 8, 8, observe.ObserverSettings("minmax"))
    name = next(n.name for n in graph_module.graph.nodes if n.target is aten.sub.Tensor)
    narrow = {**groups.ranges, name: (-1.0, 1.0)}
    found = calibrate.Calibration(groups.groups, narrow, groups.ranges)
    decided = calibrate.activations(graph_module, found, 8, {f"node:{name}": Rule(activation_bits=16)})
    assert float(decided[name].scale) == pytest.approx(199.0 / 32767, rel=1e-3)
    eight = calibrate.activations(graph_module, found, 8)
    assert float(eight[name].scale) == pytest.approx(2 / 255, rel=1e-6)
    assert plan.activation_spec(16).symmetric


def test_out_of_reach_the_rest_is_brought_to_a_quarter_of_what_must_stay() -> None:
    """The doors make 4 units of noise; of 8, 0.9 and 0.1 inside, 8 goes: the others together are 1."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    graph_module = capture(module.eval(), (torch.zeros(1, 2),))
    names = [n.name for n in graph_module.graph.nodes if n.op == "call_function"]
    door = graph_module.graph.find_nodes(op="placeholder")[0].name
    noises = {door: 3.0, names[-1]: 1.0, "linear": 8.0, "linear_1": 0.9, "relu": 0.1}
    found = [sensitivity.Sensitivity("activation", n, "", (n,), 8, 2, noise) for n, noise in noises.items()]
    assert [s.name for s in wider.choose(graph_module, found, 0.5)] == ["linear"]
    assert [s.name for s in wider.choose(graph_module, found, 4.2)] == ["linear", "linear_1"]
