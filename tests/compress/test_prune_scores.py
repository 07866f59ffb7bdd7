"""Scores of single weights against values worked out by hand or by autograd's full Hessian."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp.compress.prune import PruneChannels
from edgecomp.compress.prune_scores import CRITERIA, element_scores
from edgecomp.errors import DataError
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec


class Points:
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __init__(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        self.inputs, self.targets = inputs.astype(np.float32), targets

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield Batch((self.inputs[start : start + size],), self.targets[start : start + size])


def line(weight: list[float]) -> nn.Linear:
    """y = w x without bias; with real targets the loss is (y - t)^2."""
    layer = nn.Linear(len(weight), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weight]))
    return layer.eval()


INPUTS, TARGETS = np.array([[1.0, 2.0], [3.0, -1.0]]), np.array([[1.0], [0.0]], np.float32)


def test_fisher_by_hand() -> None:
    """w = (2, 1): errors 4 - 1 = 3 and 5 - 0 = 5, gradients 2 e x = (6, 12) and (30, -10)."""
    scores = element_scores(line([2.0, 1.0]), "fisher", Points(INPUTS, TARGETS), 10)
    expected = 0.5 * np.array([[4 * (36 + 900) / 2, 1 * (144 + 100) / 2]])
    np.testing.assert_allclose(scores["weight"].numpy(), expected, rtol=1e-6)


def test_taylor_by_hand_is_of_the_batch() -> None:
    """The mean gradient of the batch is (18, 1)."""
    scores = element_scores(line([2.0, 1.0]), "taylor", Points(INPUTS, TARGETS), 10)
    np.testing.assert_allclose(scores["weight"].numpy(), [[36.0**2, 1.0]], rtol=1e-6)


def test_hessian_of_one_weight_by_hand() -> None:
    """d2/dw2 of the mean of (w x - t)^2 is 2 mean(x^2) = 10; with one weight z H z is exact."""
    scores = element_scores(line([3.0]), "hessian", Points(INPUTS[:, :1], TARGETS), 10)
    np.testing.assert_allclose(scores["weight"].numpy(), [[0.5 * 9 * 10]], rtol=1e-6)


def test_one_draw_of_the_hessian_is_signs_times_autograds_matrix_times_signs() -> None:
    """Its mean over draws is the diagonal, as signs of different weights cancel."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh(), nn.Linear(2, 3, bias=False)).eval()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 3)), np.arange(32) % 3
    found = element_scores(module, "hessian", Points(x, y), 32)

    def loss(flat: Tensor) -> Tensor:
        values = {"0.weight": flat[:6].view(2, 3), "2.weight": flat[6:].view(3, 2)}
        outputs = torch.func.functional_call(module, values, (torch.from_numpy(x.astype(np.float32)),))
        return nn.functional.cross_entropy(outputs, torch.from_numpy(y))

    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    matrix = torch.autograd.functional.hessian(loss, weights)
    generator = torch.Generator().manual_seed(0)
    signs = torch.cat([torch.randint(0, 2, (2, 3), generator=generator).flatten() * 2.0 - 1.0,
                       torch.randint(0, 2, (3, 2), generator=generator).flatten() * 2.0 - 1.0])  # fmt: skip
    expected = (0.5 * weights**2 * signs * (matrix @ signs)).abs()
    scores = torch.cat([found["0.weight"].flatten(), found["2.weight"].flatten()])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-7)


def test_a_channel_that_does_nothing_goes_first_by_every_criterion_but_chance() -> None:
    rng = np.random.default_rng(1)
    data = Data(train=Points(rng.normal(size=(64, 1, 6, 6)), np.arange(64) % 2))
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    ).eval()
    with torch.no_grad():
        module[0].weight[5] *= 1e-3
        module[1].weight[5] = 1e-3
        module[5].weight[:, 5] = 1e-3
    start = Candidate(module, (TensorSpec("x", (1, 1, 6, 6)),))
    for criterion in CRITERIA:
        step = PruneChannels(sparsity=0.13, criterion=criterion, round_to=1, samples=64)  # type: ignore[arg-type]
        pruned = step(start, data).module
        left = pruned[0].weight.detach()
        assert left.shape[0] == 7
        if criterion != "random":
            assert torch.equal(left, module[0].weight.detach()[[0, 1, 2, 3, 4, 6, 7]]), criterion


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "hessian"])
def test_criteria_of_the_loss_need_labels(criterion: str) -> None:
    with pytest.raises(DataError, match=f"criterion {criterion} needs labelled training data"):
        element_scores(line([1.0]), criterion, None, 10)  # type: ignore[arg-type]
