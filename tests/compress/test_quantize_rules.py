"""Rules by name and type, mixed bits in one plan, the named ways to round and to correct biases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp.compress.ptq import Quantize
from edgecomp.compress.rules import Rule
from edgecomp.errors import InputError, RecipeError
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.recipe import with_settings
from edgecomp.spec import Candidate, Data, TensorSpec
from tests.compress.test_ptq import PICTURES, Net, Rows, quantized


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.b(torch.sigmoid(self.a(x)).reshape(1, 1, 6)), -1)


def bits(found: Candidate) -> dict[str, int]:
    return {n: q.spec.bits for n, q in found.quantization.activations.items()}


def test_a_rule_gives_bits_to_a_layer_and_to_the_activation_inside_it() -> None:
    found = quantized(
        Quantize(rules={"body.0": Rule(activation_bits=16), "type:linear": Rule(weight_bits=4)})
    )
    by_name = bits(found)
    assert by_name["relu_1"] == 16 and by_name["relu"] == 8 and by_name["linear"] == 8
    assert "conv2d_1" not in by_name
    widths = {n: q.spec.bits for n, q in found.quantization.weights.items()}
    assert widths == {"stem.weight": 8, "body.0.weight": 8, "head.weight": 4}
    wide = found.quantization.activations["relu_1"]
    assert wide.spec.symmetric and int(wide.zero_point) == 0


def test_values_that_share_a_scale_change_together_and_prescribed_ones_keep_theirs() -> None:
    rows = Rows(np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32))
    candidate = Candidate(Gated().eval(), (TensorSpec("x", (1, 6)),))
    found = Quantize(rules={"type:sigmoid": Rule(activation_bits=16)})(candidate, Data(calibration=rows))
    by_name = bits(found)
    assert by_name["sigmoid"] == by_name["view"] == 16 and by_name["softmax"] == 8
    assert float(found.quantization.activations["sigmoid"].scale) == 1 / 32768
    narrow = Quantize(activation_bits=16, rules={"type:softmax": Rule(activation_bits=8)})
    other = narrow(candidate, Data(calibration=rows)).quantization.activations["softmax"]
    assert float(other.scale) == 1 / 256 and int(other.zero_point) == -128


def test_a_rule_chooses_an_observer() -> None:
    spikes = PICTURES.copy()
    spikes[0, 0, 0, 0] = 1000.0
    plain = Quantize(rounding="nearest")
    ruled = Quantize(rounding="nearest", rules={"stem": Rule(observer="percentile")}, percentile=99.0)
    candidate = Candidate(Net().eval(), (TensorSpec("x", (1, 3, 8, 8)),))
    first, second = (
        s(candidate, Data(calibration=Rows(spikes))).quantization.activations for s in (plain, ruled)
    )
    assert float(second["relu"].scale) < 0.5 * float(first["relu"].scale)
    assert float(second["x"].scale) == float(first["x"].scale)


def test_a_rule_that_means_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match=r"rule pattern 'steem' matches no module"):
        quantized(Quantize(rules={"steem": Rule(activation_bits=16)}))


def test_rules_are_read_from_recipes_and_refused_with_their_key() -> None:
    step = with_settings(Quantize, {"rules": {"stem": {"activation_bits": 16}}}, "step 'quantize'")
    assert step.rules == {"stem": Rule(activation_bits=16)}
    with pytest.raises(RecipeError, match=r"rules.stem.activation_bit"):
        with_settings(Quantize, {"rules": {"stem": {"activation_bit": 16}}}, "step 'quantize'")
    with pytest.raises(InputError, match=r"activation_bits of a rule is 12; expected 8 or 16"):
        Rule(activation_bits=12)


@pytest.mark.parametrize("correction", ["analytic", "empirical"])
def test_correction_restores_the_mean_output(correction: str) -> None:
    plain = quantized(Quantize(rounding="nearest", weight_bits=4, bias_correction="none"))
    mended = quantized(Quantize(rounding="nearest", weight_bits=4, bias_correction=correction))  # type: ignore[arg-type]
    x = torch.from_numpy(PICTURES)

    def shift(found: Candidate) -> float:
        rounded = fake_quantize(found.module, found.quantization)
        with torch.no_grad():
            outputs = torch.cat([rounded(x[i : i + 1]) for i in range(len(x))])
            return float((outputs - Net().eval()(x)).mean(0).abs().max())

    assert shift(mended) < 0.5 * shift(plain)
    for name, q in plain.quantization.weights.items():
        np.testing.assert_array_equal(q.values, mended.quantization.weights[name].values)


def test_sequential_mse_takes_a_smaller_scale_where_that_pays() -> None:
    plain = quantized(Quantize(rounding="nearest", weight_bits=4)).quantization.weights
    chosen = quantized(Quantize(rounding="sequential-mse", weight_bits=4)).quantization.weights
    ratios = chosen["stem.weight"].scale / plain["stem.weight"].scale
    assert ratios.max() <= 1.0 + 1e-6 and ratios.min() >= 0.6 - 1e-6 and ratios.min() < 0.99


def test_descent_lowers_the_error_that_gptq_left() -> None:
    """On the layer's own objective: the first layer, whose inputs are alike for both."""
    steps = (Quantize(rounding=r, weight_bits=4, observer="minmax") for r in ("gptq", "descent"))  # type: ignore[arg-type]
    plans = [quantized(step).quantization for step in steps]
    assert not np.array_equal(*(p.weights["stem.weight"].values for p in plans))
    door = plans[0].activations["x"]
    x = torch.fake_quantize_per_tensor_affine(
        torch.from_numpy(PICTURES), float(door.scale), int(door.zero_point), -128, 127
    )
    columns = nn.functional.unfold(x, 3).transpose(0, 1).flatten(1).double().numpy()
    original = Net().stem.weight.detach().double().numpy().reshape(8, -1)
    errors = []
    for each in plans:
        q = each.weights["stem.weight"]
        restored = q.values.reshape(8, -1) * q.scale.astype(np.float64)[:, None]
        errors.append(float(np.square((restored - original) @ columns).sum()))
    assert errors[1] < errors[0]


def test_a_rule_rounds_a_layers_weight_in_another_way() -> None:
    """Plain rounding of one layer is rounding by hand; the others keep GPTQ. And the other way round."""
    plain, best = quantized(Quantize(rounding="nearest")), quantized(Quantize())
    one = quantized(Quantize(rules={"head": Rule(rounding="nearest")}))
    values = {n: q.values for n, q in one.quantization.weights.items()}
    np.testing.assert_array_equal(values["head.weight"], plain.quantization.weights["head.weight"].values)
    np.testing.assert_array_equal(values["stem.weight"], best.quantization.weights["stem.weight"].values)
    weight = one.original.head.weight.detach().numpy()
    scale = np.abs(weight).max(1, keepdims=True) / 127
    np.testing.assert_array_equal(values["head.weight"], np.rint(weight / scale))
    other = quantized(Quantize(rounding="nearest", rules={"stem": Rule(rounding="gptq")}))
    found = other.quantization.weights
    np.testing.assert_array_equal(
        found["stem.weight"].values, best.quantization.weights["stem.weight"].values
    )
    np.testing.assert_array_equal(
        found["head.weight"].values, plain.quantization.weights["head.weight"].values
    )
    with pytest.raises(InputError, match="rounding of a rule is 'up'"):
        Rule(rounding="up")  # type: ignore[arg-type]
