from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp import checkpoint
from edgecomp.compress.iterative import PruneIteratively, targets
from edgecomp.compress.layers import DropLayers, longest_stack
from edgecomp.compress.macs import count_macs
from edgecomp.compress.movement import Mover, PruneMovement
from edgecomp.compress.prune import PruneChannels
from edgecomp.errors import DataError, ModelError, RecipeError
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec

CODE = """\
import torch
from torch import nn
class Block(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.num_heads, self.attn_dim = 2, 8
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.out.weight.data *= gain
        self.out.bias.data *= gain
    def forward(self, x):
        heads = self.q(x).view(x.shape[0], self.num_heads, 4)
        return x + self.out(torch.tanh(heads).reshape(x.shape[0], self.attn_dim))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(1.0), Block(0.001), Block(2.0), Block(0.01))
        self.head = nn.Linear(8, 3)
    def forward(self, x):
        return self.head(self.blocks(x))
def build():
    torch.manual_seed(0)
    return Net()
"""


class Points:
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return 96

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        targets = (np.arange(96) % 3).astype(np.int64)
        inputs = (rng.normal(size=(96, 8)) + 3 * np.eye(3, 8)[targets]).astype(np.float32)
        order = np.arange(96) if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(96)
        for start in range(0, 96, size):
            rows = order[start : start + size]
            yield Batch((inputs[rows],), targets[rows])


@pytest.fixture
def origin(tmp_path: Path) -> checkpoint.Origin:
    (tmp_path / "blocks.py").write_text(CODE)
    return checkpoint.Origin(f"{tmp_path / 'blocks.py'}:build")


def start(origin: checkpoint.Origin) -> Candidate:
    return Candidate(origin.load(), (TensorSpec("x", (1, 8)),))


@pytest.mark.parametrize("criterion", ["output", "loss"])
def test_the_blocks_that_do_least_go_first(origin: checkpoint.Origin, criterion: str) -> None:
    candidate = start(origin)
    step = DropLayers(count=2, criterion=criterion)  # type: ignore[arg-type]
    result = step(candidate, Data(calibration=Points()))
    if criterion == "output":
        assert result.history[-1].settings["removed"] == ["blocks.1", "blocks.3"]
    assert len(result.module.blocks) == 2 and len(candidate.module.blocks) == 4
    kept = DropLayers(count=1, keep=(1, 3))(candidate, Data(calibration=Points())).history[-1]
    assert kept.settings["removed"][0] in ("blocks.0", "blocks.2")


def test_dropped_layers_and_pruned_heads_come_back_from_a_checkpoint(
    origin: checkpoint.Origin, tmp_path: Path
) -> None:
    candidate = DropLayers(count=1, keep=(0,))(start(origin), Data(calibration=Points()))
    candidate = DropLayers(count=1, keep=(0,))(candidate, Data(calibration=Points()))
    pruned = PruneChannels(sparsity=0.5, round_to=1)(candidate, Data())
    assert {b.num_heads for b in pruned.module.blocks} == {1}
    checkpoint.save(pruned, origin, tmp_path / "p.pt")
    loaded, _ = checkpoint.load(tmp_path / "p.pt")
    x = torch.randn(3, 8)
    assert torch.equal(loaded.module(x), pruned.module(x))


def test_layers_errors(origin: checkpoint.Origin) -> None:
    with pytest.raises(DataError, match="needs calibration or training data"):
        DropLayers()(start(origin), Data())
    with pytest.raises(RecipeError, match="stacks are blocks"):
        DropLayers(stack="head")(start(origin), Data(calibration=Points()))
    with pytest.raises(RecipeError, match="no part of the model"):
        DropLayers(stack="nothing")(start(origin), Data(calibration=Points()))
    with pytest.raises(ModelError, match="no stack of equal blocks"):
        longest_stack(nn.Linear(2, 2))


def test_schedules_by_hand() -> None:
    assert targets(0.5, 2, "linear") == pytest.approx([0.75, 0.5])
    assert targets(0.5, 2, "cubic") == pytest.approx([1 - 0.5 * 0.875, 0.5])


def test_rounds_end_at_the_budget() -> None:
    module = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    candidate = Candidate(module, (TensorSpec("x", (1, 8)),))
    step = PruneIteratively(macs=0.5, rounds=2, final_epochs=1, round_to=1, batch_size=16, criterion="l2")
    result = step(
        Candidate(candidate.module, candidate.inputs, original=candidate.module), Data(train=Points())
    )
    zeros = (torch.zeros(1, 8),)
    assert count_macs(result.module, zeros) <= 0.5 * count_macs(candidate.module, zeros)
    assert [r.name for r in result.history] == ["prune-iterative"]
    assert result.history[0].notes[1].startswith("round 2:")


def test_weights_that_move_to_zero_become_zero() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0, -1.0, -1.0]))
    weight.grad = torch.tensor([0.5, -0.5, -0.5, 0.5])
    mover = Mover({"w": weight}, sparsity=0.5, updates=2)
    mover()
    # Scores -w * grad = -0.5, 0.5, -0.5, 0.5: a step against the gradient shrinks the first and third.
    assert weight.tolist() == [0.0, 1.0, 0.0, -1.0]


def test_by_magnitude_the_smallest_become_zero_and_stay_zero() -> None:
    weight = nn.Parameter(torch.tensor([0.1, 3.0, -0.2, 1.0]))
    mover = Mover({"w": weight}, sparsity=0.5, updates=4, criterion="magnitude")
    mover()  # a quarter of the cubic curve: 0.5 * (1 - 1/8) of four weights is two
    assert weight.tolist() == [0.0, 3.0, 0.0, 1.0]
    with torch.no_grad():
        weight += torch.tensor([9.0, 0.0, 0.0, 0.0])  # an update that would bring one back
    mover()
    assert weight.tolist() == [0.0, 3.0, 0.0, 1.0]


def test_of_each_layer_the_same_share_goes() -> None:
    small, large = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0, 4.0]))
    Mover({"a": small, "b": large}, 0.5, 2, "magnitude", "layer")()
    assert (small.tolist(), large.tolist()) == ([0.0, 2.0], [0.0, 4.0])
    small, large = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0, 4.0]))
    Mover({"a": small, "b": large}, 0.5, 2, "magnitude", "global")()
    assert (small.tolist(), large.tolist()) == ([0.0, 0.0], [3.0, 4.0])


def test_gradual_magnitude_leaves_excluded_layers_dense(origin: checkpoint.Origin) -> None:
    step = PruneMovement(epochs=4, batch_size=16, sparsity=0.5, criterion="magnitude", scope="layer",
                         exclude=("blocks.0.q",))  # fmt: skip
    result = step(start(origin), Data(train=Points()))
    linear = {n: m.weight for n, m in result.module.named_modules() if isinstance(m, nn.Linear)}
    assert bool((linear.pop("blocks.0.q") != 0).all()) and linear
    assert all(int((w == 0).sum()) == round(0.5 * w.numel()) for w in linear.values())
    assert "blocks.0.q not pruned: excluded" in result.history[-1].notes
    with pytest.raises(RecipeError, match="exclude pattern 'x' matches no layer"):
        PruneMovement(exclude=("x",))(start(origin), Data(train=Points()))


def test_movement_reaches_its_sparsity(origin: checkpoint.Origin) -> None:
    result = PruneMovement(epochs=4, batch_size=16, sparsity=0.5)(start(origin), Data(train=Points()))
    weights = [m.weight for m in result.module.modules() if isinstance(m, nn.Linear)]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert zeros == round(0.5 * sum(w.numel() for w in weights))
    assert isinstance(result.module(torch.zeros(1, 8)), Tensor)
