from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from edgecomp.compress.distill import Distill
from edgecomp.compress.distill_cache import TeacherCache
from edgecomp.compress.distill_layers import pairs_of
from edgecomp.compress.distill_losses import (
    attention_loss,
    cosine_loss,
    decoupled_loss,
    logit_loss,
    relation_loss,
    reverse_loss,
)
from edgecomp.errors import ModelError, RecipeError
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec


class Pictures:
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.targets = (np.arange(48) % 3).astype(np.int64)
        self.inputs = rng.normal(size=(48, 1, 8, 8)).astype(np.float32)
        self.inputs[np.arange(48), 0, self.targets] += 2.0

    def __len__(self) -> int:
        return 48

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        order = np.arange(48) if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(48)
        for start in range(0, 48, size):
            rows = order[start : start + size]
            yield Batch((self.inputs[rows],), self.targets[rows])


def net(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).eval()


def candidate(teacher: nn.Module) -> Candidate:
    return Candidate(net(4), (TensorSpec("x", (1, 1, 8, 8)),), original=teacher)


@given(st.integers(0, 1000), st.floats(0.5, 8.0))
def test_decoupling_is_a_regrouping_of_the_whole(seed: int, temperature: float) -> None:
    """KL = KL of (target, rest) + (1 - p_target) * KL among the others (Zhao et al. 2022, eq. 5)."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(1, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.tensor([2])
    p = float(F.softmax(teacher / temperature, 1)[0, 2])
    whole = float(logit_loss(student, teacher, temperature))
    parts = float(decoupled_loss(student, teacher, targets, temperature, 1.0, 1.0 - p))
    assert parts == pytest.approx(whole, rel=1e-5, abs=1e-9)


def test_reverse_divergence_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    q = np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()
    assert float(reverse_loss(student, teacher, 1.0)) == pytest.approx(
        float((q * np.log(q / 0.5)).sum()), rel=1e-5
    )


def test_attention_map_ignores_width_and_scale() -> None:
    features = torch.randn(2, 3, 4, 4)
    twice = torch.cat([features, features], dim=1) * 5
    assert float(attention_loss(features, twice)) == pytest.approx(0.0, abs=1e-6)
    # Maps (1, 0) and (0, 1): squared distance 2.
    one, other = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.0, 3.0]]]])
    assert float(attention_loss(one, other)) == pytest.approx(2.0)


def test_relations_ignore_rotation_and_scale() -> None:
    points = torch.randn(6, 2)
    turned = points @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) * 7
    assert float(relation_loss(points, turned)) == pytest.approx(0.0, abs=1e-6)
    line, corner = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    distances = np.array([[1, 2, 1], [1, np.sqrt(2), 1]])
    scaled = distances / distances.mean(axis=1, keepdims=True)
    expected = np.mean(0.5 * (scaled[0] - scaled[1]) ** 2)
    assert float(relation_loss(line, corner)) == pytest.approx(expected, rel=1e-5)


def test_one_sample_has_no_relations() -> None:
    student = torch.ones(1, 2, requires_grad=True)
    relation_loss(student, torch.zeros(1, 3)).backward()
    assert student.grad is not None and not student.grad.any()


def test_cosine_by_hand() -> None:
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert float(cosine_loss(student, teacher)) == pytest.approx(((1 - 0.6) + (1 + 1)) / 2)
    assert float(cosine_loss(student * 7, teacher)) == pytest.approx(1.2)


class Points:
    """Points in the plane, without targets."""

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __init__(self) -> None:
        self.inputs = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)

    def __len__(self) -> int:
        return 64

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, 64, size):
            yield Batch((self.inputs[start : start + size],))


def embedder(seed: int, width: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, width)).eval()


@pytest.mark.parametrize("loss, width", [("regression", 4), ("cosine", 4), ("relation", 3)])
def test_embeddings_are_learned_from_a_teacher(loss: str, width: int) -> None:
    teacher, inputs = embedder(0, 4), torch.from_numpy(Points().inputs)
    start = Candidate(embedder(1, width), (TensorSpec("x", (1, 2)),), original=teacher)
    step = Distill(epochs=60, batch_size=16, learning_rate=0.01, alpha=1.0, validation=0.0, loss=loss)  # type: ignore[arg-type]
    student = step(start, Data(train=Points())).module
    with torch.no_grad():
        points = [m(inputs) for m in (start.module, student, teacher)]
    if loss == "cosine":  # which says nothing of lengths
        points = [F.normalize(p, dim=1) for p in points]
    before, after = (np.corrcoef(torch.pdist(p), torch.pdist(points[2]))[0, 1] for p in points[:2])
    assert after > 0.97 > before


def test_the_cache_asks_each_sample_once_and_answers_the_same() -> None:
    teacher = net(8)
    cache = TeacherCache(lambda inputs: teacher(inputs[0]), rows=10)
    x = torch.randn(10, 1, 8, 8)
    expected = teacher(x).detach()
    assert torch.equal(cache((x[:6],)), expected[:6])
    assert torch.equal(cache((x[4:],)), teacher(x[4:]).detach())
    assert cache.asked == 12  # a batch with one new sample is asked whole
    shuffled = torch.tensor([9, 0, 5])
    torch.testing.assert_close(cache((x[shuffled],)), expected[shuffled])
    assert cache.asked == 12
    cache.close()


@pytest.mark.parametrize("match", ["feature", "attention", "relation"])
def test_layers_are_matched_through_a_projection_where_widths_differ(match: str) -> None:
    teacher = net(8)
    start = candidate(teacher)
    step = Distill(
        epochs=3,
        batch_size=16,
        learning_rate=0.01,
        alpha=1.0,
        layers=("0", "2=2"),
        match=match,  # type: ignore[arg-type]
    )
    data = Data(train=Pictures())
    student = step(start, data).module
    x = torch.from_numpy(Pictures().inputs)
    with torch.no_grad():
        before, after = (F.mse_loss(m(x), teacher(x)) for m in (start.module, student))
    assert float(after) < float(before)
    assert not any(m._forward_hooks for m in (*teacher.modules(), *student.modules()))
    assert set(student.state_dict()) == set(start.module.state_dict())


def test_several_teachers_by_name(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    (folder / "t.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def one():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
    )
    step = Distill(
        epochs=1, batch_size=16, alpha=1.0, teachers=(f"{folder / 't.py'}:one",) * 2, loss="reverse"
    )
    result = step(Candidate(net(4), (TensorSpec("x", (1, 1, 8, 8)),)), Data(train=Pictures()))
    assert result.history[-1].settings["loss"] == "reverse"


def test_errors() -> None:
    assert pairs_of(("a", "b = c")) == [("a", "a"), ("b", "c")]
    with pytest.raises(RecipeError, match="'9' is no part of the student"):
        Distill(layers=("9=0",))(candidate(net(8)), Data(train=Pictures()))
    with pytest.raises(ModelError, match="attention maps of the student have shape"):
        Distill(layers=("0=2",), match="attention")(candidate(net(8)), Data(train=Pictures()))
    wide = Candidate(embedder(1, 3), (TensorSpec("x", (1, 2)),), original=embedder(0, 4))
    with pytest.raises(ModelError, match=r"outputs of the student have shape \(16, 3\)"):
        Distill(loss="cosine", alpha=1.0, batch_size=16, validation=0.0)(wide, Data(train=Points()))
    with pytest.raises(RecipeError, match="loss is kd; expected logits"):
        Distill(loss="kd")  # type: ignore[arg-type]
