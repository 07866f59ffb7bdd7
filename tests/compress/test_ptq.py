"""The quantize step: its settings, what it refuses, and what stays float."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp.compress.ptq import Quantize
from edgecomp.errors import DataError, InputError
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec


class Rows:
    labels: tuple[str, ...] = ()

    def __init__(self, values: np.ndarray, preprocessing: Preprocessing | None = None) -> None:
        self.values, self.preprocessing = values, preprocessing

    def __len__(self) -> int:
        return len(self.values)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield Batch((self.values[start : start + size],))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(torch.relu(self.stem(x))).mean((2, 3)))


PICTURES = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)


def candidate() -> Candidate:
    return Candidate(Net().eval(), (TensorSpec("x", (1, 3, 8, 8)),))


def quantized(step: Quantize, preprocessing: Preprocessing | None = None) -> Candidate:
    return step(candidate(), Data(calibration=Rows(PICTURES, preprocessing)))


def test_every_layer_is_quantized_and_the_candidate_stays() -> None:
    given = candidate()
    found = Quantize()(given, Data(calibration=Rows(PICTURES)))
    assert given.quantization is None and given.history == ()
    assert found.original is given.module
    assert set(found.quantization.weights) == {"stem.weight", "body.0.weight", "head.weight"}
    assert found.quantization.float_nodes == {}
    assert found.history[-1].kind == "quantize"


@pytest.mark.parametrize("observer", ["minmax", "moving-average", "percentile", "entropy", "mse", "output"])
def test_fake_quantized_outputs_stay_near_the_float_model(observer: str) -> None:
    found = quantized(Quantize(observer=observer))  # type: ignore[arg-type]
    rounded = fake_quantize(found.module, found.quantization)
    with torch.no_grad():
        x = torch.from_numpy(PICTURES[:1])
        expected, result = candidate().module(x).numpy(), rounded(x).numpy()
    assert 10 * np.log10(np.sum(expected**2) / np.sum((expected - result) ** 2)) > 20


def test_training_data_serve_when_there_are_no_calibration_data() -> None:
    found = Quantize(samples=4)(candidate(), Data(train=Rows(PICTURES)))
    assert found.quantization is not None


@pytest.mark.parametrize("data", [Data(), Data(calibration=Rows(PICTURES[:0]))], ids=["none", "empty"])
def test_calibration_data_are_needed(data: Data) -> None:
    with pytest.raises(DataError, match="quantize needs calibration data"):
        Quantize()(candidate(), data)


def test_nan_in_calibration_data_is_refused() -> None:
    broken = PICTURES.copy()
    broken[3, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        Quantize()(candidate(), Data(calibration=Rows(broken)))


def test_the_door_covers_every_pixel_value() -> None:
    """8-bit pixels become -127/128 to 1 exactly, whatever the calibration pictures hold."""
    preprocessing = Preprocessing(rescale=1 / 128, mean=(127 / 128,) * 3, std=(1.0,) * 3)
    step = Quantize()
    dark = Rows(np.full((4, 3, 8, 8), -0.5, np.float32), preprocessing)
    found = step(candidate(), Data(calibration=dark))
    (door,) = found.module.graph.find_nodes(op="placeholder")
    assert float(found.quantization.activations[door.name].scale) == np.float32((127 + 128) / 128 / 255)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("stem", {"conv2d"}),
        ("body", {"conv2d_1", "relu_1"}),
        ("bod*", {"conv2d_1", "relu_1"}),
        ("type:linear", {"linear"}),
        ("type:conv*", {"conv2d", "conv2d_1"}),
    ],
)
def test_excluded_patterns(pattern: str, expected: set[str]) -> None:
    found = quantized(Quantize(exclude=(pattern,)))
    assert set(found.quantization.float_nodes) == expected
    assert set(found.quantization.float_nodes.values()) == {f"excluded by {pattern!r}"}
    assert any("stays float: excluded by" in note for note in found.history[-1].notes)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="exclude pattern 'hed' matches no module; modules are .*head"):
        quantized(Quantize(exclude=("hed",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 5}, "weight_bits is 5"),
        ({"activation_bits": 4}, "activation_bits is 4"),
        ({"samples": 0}, "samples is 0"),
        ({"observer": "max"}, "observer is 'max'"),
        ({"percentile": 20.0}, "percentile is 20"),
    ],
)
def test_settings_are_checked_when_the_step_is_made(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Quantize(**settings)  # type: ignore[arg-type]
