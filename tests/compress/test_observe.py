"""Observers against numbers computed by hand and known distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp.compress.observe import (
    SENTINEL_MARGIN,
    Extent,
    ObserverSettings,
    observe,
    tensor_batches,
)
from edgecomp.errors import DataError, InputError
from edgecomp.graph import capture
from edgecomp.spec import Batch, QuantSpec


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Rows:
    labels, preprocessing = (), None

    def __init__(self, count: int) -> None:
        self.values = np.arange(count, dtype=np.float32).reshape(count, 1)

    def __len__(self) -> int:
        return len(self.values)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield Batch((self.values[start : start + size],))


def ranges(
    module: nn.Module, batches: Sequence[Tensor], observer: str = "minmax", **settings: float
) -> dict[str, tuple[float, float]]:
    """Range of every value that a call of the captured graph gives, by operation name."""
    graph_module = capture(module.eval(), (batches[0],))
    nodes = [n for n in graph_module.graph.nodes if n.op in ("placeholder", "call_function")]
    names = [n.name for n in nodes if n.meta["val"].is_floating_point()]
    chosen = ObserverSettings(observer, **settings)  # type: ignore[arg-type]
    return observe(graph_module, lambda: ((b,) for b in batches), names, QuantSpec(), chosen)


DOUBLE = Function(lambda x: x * 2)


def test_min_max_is_exact_over_all_batches() -> None:
    found = ranges(DOUBLE, [torch.tensor([[1.0, -3.0]]), torch.tensor([[0.5, 7.0]])])
    assert sorted(found.values()) == [(-6.0, 14.0), (-3.0, 7.0)]


def test_moving_average_by_hand() -> None:
    """Momentum 0.1: 10, then 10 + 0.1 * (20 - 10) = 11, then 11 + 0.1 * (0 - 11) = 9.9."""
    batches = [torch.tensor([[0.0, v]]) for v in (10.0, 20.0, 0.0)]
    found = ranges(Function(torch.exp), batches, "moving-average")
    low, high = found["x"]
    assert low == 0.0 and high == pytest.approx(9.9)


@pytest.mark.parametrize("mark", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("observer", ["minmax", "moving-average", "mse", "entropy", "percentile"])
def test_masks_are_kept_out_of_the_range(mark: float, observer: str) -> None:
    mask = torch.tensor([[0.0, mark, 0.0, mark]])
    module = Function(lambda x: torch.softmax(x + mask, -1))
    found = ranges(module, [torch.tensor([[1.0, 50.0, 3.0, -50.0]])], observer, percentile=100.0)
    low, high = found["add"]
    assert high == pytest.approx(3.0, abs=0.1) and low == pytest.approx(high - SENTINEL_MARGIN, abs=0.1)


def test_a_value_that_is_masked_only_has_no_range() -> None:
    assert Extent(marked=True).final() == (0.0, 0.0)
    everything = Function(lambda x: x + float("-inf"))
    assert ranges(everything, [torch.ones(1, 3)])["add"] == (0.0, 0.0)


def test_a_mask_keeps_a_lower_range_that_is_wide_enough() -> None:
    extent = Extent(marked=True)
    extent.widen(-100.0, 5.0)
    assert extent.final() == (-100.0, 5.0)


def test_nan_is_refused_with_the_name_of_its_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Function(lambda x: torch.log(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * 2

    with pytest.raises(DataError, match=r"calibration gave NaN at 'body' \(log\)"):
        ranges(Net(), [torch.tensor([[1.0]]), torch.tensor([[-1.0]])])


def test_percentile_mse_and_entropy_on_a_normal_distribution_with_an_outlier() -> None:
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 100_000)).astype(np.float32))
    values[0, 0] = 60.0
    low, high = ranges(DOUBLE, [values], "percentile", percentile=99.9)["x"]
    assert low == pytest.approx(-3.29, abs=0.1) and high == pytest.approx(3.29, abs=0.1)
    minmax = ranges(DOUBLE, [values])["x"]
    for observer in ("mse", "entropy"):
        found = ranges(DOUBLE, [values], observer)["x"]
        assert minmax[0] <= found[0] < -2.0 and 3.0 < found[1] <= minmax[1]
    assert ranges(DOUBLE, [values], "mse")["x"][1] < 60.0


def test_a_constant_value_has_one_point_for_a_range() -> None:
    for observer in ("minmax", "mse", "entropy", "percentile"):
        assert ranges(DOUBLE, [torch.full((1, 4), 2.0)], observer)["x"] == (2.0, 2.0)


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="observer is 'max'; expected one of minmax"):
        ObserverSettings("max")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="percentile is 40"):
        ObserverSettings("percentile", 40)


@pytest.mark.parametrize(
    ("samples", "size", "sizes"), [(5, 2, [2, 2, 1]), (4, 2, [2, 2]), (99, 4, [4, 3]), (1, 4, [1])]
)
def test_tensor_batches_stop_at_the_number_of_samples(samples: int, size: int, sizes: list[int]) -> None:
    batches = [b[0] for b in tensor_batches(Rows(7), samples, size)]
    assert [len(b) for b in batches] == sizes
    assert torch.cat(batches).flatten().tolist() == list(range(sum(sizes)))
