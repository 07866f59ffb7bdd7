from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgecomp import checkpoint
from edgecomp.compress.distill import Distill, logit_loss
from edgecomp.compress.fit import _part, _rate, _shifted
from edgecomp.compress.magnitude import PruneMagnitude
from edgecomp.compress.train import Finetune, task_loss
from edgecomp.errors import DataError, ModelError, RecipeError
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec


class Blobs:
    """Three well separated clouds of points: `inputs` [N, 4], `targets` [N]."""

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __init__(self, count: int = 120, labelled: bool = True) -> None:
        rng = np.random.default_rng(0)
        self.targets = (np.arange(count) % 3).astype(np.int64)
        self.inputs = (rng.normal(size=(count, 4)) + 3 * np.eye(3, 4)[self.targets]).astype(np.float32)
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        order = np.arange(len(self))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(order)
        for start in range(0, len(self), size):
            rows = order[start : start + size]
            yield Batch((self.inputs[rows],), self.targets[rows] if self.labelled else None)


def candidate(seed: int = 0) -> Candidate:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3)).eval()
    return Candidate(module, (TensorSpec("x", (1, 4)),), original=module)


def accuracy(module: nn.Module) -> float:
    data = Blobs()
    with torch.no_grad():
        return float((module(torch.from_numpy(data.inputs)).argmax(1).numpy() == data.targets).mean())


def test_finetune_learns_is_repeatable_and_leaves_its_input_alone() -> None:
    start = candidate()
    before = start.module[0].weight.clone()
    step = Finetune(epochs=12, batch_size=16, learning_rate=0.02)
    first, second = step(start, Data(train=Blobs())), step(start, Data(train=Blobs()))
    assert accuracy(first.module) > 0.9 > accuracy(start.module)
    assert torch.equal(first.module[0].weight, second.module[0].weight)
    assert torch.equal(start.module[0].weight, before)
    assert not first.module.training
    assert first.history[-1].settings["epochs"] == 12 and "held-out" in first.history[-1].notes[0]


def test_held_out_part_and_rest_are_all_of_the_data_once() -> None:
    settings, data = Finetune(validation=0.25, batch_size=7), Blobs()
    held = np.concatenate([b.inputs[0] for b in _part(data, settings, held_out=True)])
    rest = np.concatenate([b.inputs[0] for b in _part(data, settings, held_out=False, shuffle_seed=3)])
    both = np.concatenate([held, rest])
    assert 10 < len(held) < 50
    assert np.array_equal(np.unique(both, axis=0), np.unique(data.inputs, axis=0)) and len(both) == len(data)


def test_pruned_zeros_stay_zero_while_training() -> None:
    sparse = PruneMagnitude(sparsity=0.5)(candidate(), Data())
    zeros = [sparse.module[i].weight == 0 for i in (0, 3)]
    trained = Finetune(epochs=2, batch_size=16, learning_rate=0.02)(sparse, Data(train=Blobs())).module
    for i, mask in zip((0, 3), zeros, strict=True):
        assert torch.equal(trained[i].weight == 0, mask)


def test_schedule_by_hand() -> None:
    assert _rate(0, 100, 0.0) == 1.0
    assert _rate(50, 100, 0.0) == pytest.approx(0.5)
    assert _rate(100, 100, 0.0) == pytest.approx(0.0)
    assert _rate(0, 100, 0.1) == pytest.approx(1 / 11)


def test_shift_moves_pictures_by_whole_pixels() -> None:
    torch.manual_seed(0)
    picture = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(8, 1, 1, 1)
    moved = _shifted(picture, 1)
    padded = F.pad(picture[:1], (1, 1, 1, 1), mode="replicate")[0, 0]
    windows = [padded[i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    assert all(any(torch.equal(m[0], w) for w in windows) for m in moved)


def test_logit_loss_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    p = np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()
    expected = 4.0 * float((p * np.log(p / 0.5)).sum())
    assert float(logit_loss(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-5)


def test_student_comes_close_to_a_teacher_without_labels() -> None:
    teacher = Finetune(epochs=12, batch_size=16, learning_rate=0.02)(candidate(), Data(train=Blobs())).module
    start = Candidate(candidate(seed=5).module, (TensorSpec("x", (1, 4)),), original=teacher)
    step = Distill(epochs=12, batch_size=16, learning_rate=0.02, alpha=1.0)
    student = step(start, Data(train=Blobs(labelled=False))).module
    x = torch.from_numpy(Blobs().inputs)
    with torch.no_grad():
        agreement = float((student(x).argmax(1) == teacher(x).argmax(1)).float().mean())
    assert agreement > 0.9


def test_errors_name_the_way_out() -> None:
    with pytest.raises(DataError, match="needs training data"):
        Finetune()(candidate(), Data())
    with pytest.raises(DataError, match="use a labelled source"):
        Finetune()(candidate(), Data(train=Blobs(labelled=False)))
    with pytest.raises(DataError, match="do not fit outputs"):
        task_loss(torch.zeros(2, 3), torch.tensor([0, 7]))
    with pytest.raises(ModelError, match="lower learning_rate"):
        Finetune(optimizer="sgd", learning_rate=1e30)(candidate(), Data(train=Blobs()))
    with pytest.raises(RecipeError, match="epochs is 0"):
        Finetune(epochs=0)
    with pytest.raises(RecipeError, match="temperature is 0"):
        Distill(temperature=0)
    orphan = Candidate(candidate().module, (TensorSpec("x", (1, 4)),))
    with pytest.raises(ModelError, match="no float original"):
        Distill()(orphan, Data(train=Blobs()))


def test_a_pruned_model_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    from edgecomp.compress.prune import PruneChannels

    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),\n"
        "                         nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(), nn.Linear(256, 3))\n"
    )
    origin = checkpoint.Origin(f"{tmp_path / 'net.py'}:build")
    start = Candidate(origin.load(), (TensorSpec("x", (1, 1, 8, 8), layout="NCHW"),))
    pruned = PruneChannels(sparsity=0.5)(start, Data())
    checkpoint.save(pruned, origin, tmp_path / "pruned.pt")
    loaded, again = checkpoint.load(tmp_path / "pruned.pt")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded.module(x), pruned.module(x))
    assert loaded.module[3].groups == 8 and loaded.inputs == pruned.inputs
    assert loaded.history[-1].notes == pruned.history[-1].notes and again.model == origin.model
