from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp.compress import interim
from edgecomp.compress.distill_cache import TeacherCache
from edgecomp.compress.fit import fit
from edgecomp.compress.train import Finetune, first_output, task_loss
from edgecomp.spec import Batch, Preprocessing


class Blobs:
    """Three clouds of points: `inputs` [120, 4], `targets` [120]."""

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.targets = (np.arange(120) % 3).astype(np.int64)
        self.inputs = (rng.normal(size=(120, 4)) + 3 * np.eye(3, 4)[self.targets]).astype(np.float32)

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        order = np.random.default_rng(shuffle_seed).permutation(120) if shuffle_seed else np.arange(120)
        for start in range(0, 120, size):
            rows = order[start : start + size]
            yield Batch((self.inputs[rows],), self.targets[rows])


class Stopped(Exception):
    """Stands for a kill: nothing after it runs."""


def objective(module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
    return task_loss(first_output(module, inputs), targets)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))


def run(folder: Path, settings: Finetune, stop_at: int | None = None) -> dict[str, Tensor]:
    updates = 0

    def after_update() -> None:
        nonlocal updates
        updates += 1
        if updates == stop_at:
            raise Stopped

    module = net()
    with interim.within(folder, seconds=0.0):
        fit(module, Blobs(), settings, objective, after_update=after_update)
    return dict(module.state_dict())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop_at", [2, 9, 15, 16, 17])
def test_stopped_at_any_update_the_weights_end_the_same(
    tmp_path: Path, stop_at: int, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interim, "_SHARE", 1e9)
    settings = Finetune(epochs=3, batch_size=16, learning_rate=0.02, optimizer=optimizer, patience=2)
    whole = run(tmp_path / "whole", settings)
    with pytest.raises(Stopped):
        run(tmp_path / "killed", settings, stop_at)
    resumed = run(tmp_path / "killed", settings)
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    settings = Finetune(epochs=2, batch_size=16)
    first = run(tmp_path, settings)
    again = run(tmp_path, settings, stop_at=1)
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_the_teacher_is_not_asked_again_for_what_it_answered_before_the_kill(tmp_path: Path) -> None:
    inputs = (torch.from_numpy(np.arange(12, dtype=np.float32).reshape(4, 3)),)
    first = TeacherCache(lambda x: x[0] * 2, rows=6, folder=tmp_path)
    first(inputs)
    second = TeacherCache(lambda x: x[0] * 2, rows=6, folder=tmp_path)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(inputs), inputs[0] * 2) and second.asked == 0
    assert second((inputs[0] + 1,)).shape == (4, 3) and second.asked == 4
    third = TeacherCache(lambda x: x[0] * 2, rows=7, folder=tmp_path / "gone")
    third.load_state_dict(first.state_dict())
    assert torch.equal(third(inputs), inputs[0] * 2) and third.asked == 4


def test_without_an_open_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(net(), Blobs(), Finetune(epochs=1), objective)
    assert not list(tmp_path.iterdir()) and interim.folder_for("teacher") is None
