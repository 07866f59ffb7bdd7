from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp.compress.distill_losses import reverse_loss
from edgecomp.compress.distill_text import DistillText, jensen_shannon_loss, written
from edgecomp.errors import DataError, ModelError, RecipeError
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec

VOCABULARY, LENGTH = 7, 10


class Bigrams(nn.Module):
    """Logits of the next token from the last one alone: a causal model whose table can be read."""

    def __init__(self, seed: int, scale: float = 3.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator) * scale)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


class Text:
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __init__(self, width: int = LENGTH) -> None:
        self.tokens = np.random.default_rng(0).integers(0, VOCABULARY, (48, width))

    def __len__(self) -> int:
        return 48

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for start in range(0, 48, size):
            yield Batch((self.tokens[start : start + size],))


def start() -> Candidate:
    spec = TensorSpec("tokens", (1, LENGTH), "int64")
    return Candidate(Bigrams(1), (spec,), original=Bigrams(0))


@torch.no_grad()
def distance(module: nn.Module) -> float:
    student, teacher = module.table.log_softmax(-1), Bigrams(0).table.log_softmax(-1)
    return float((teacher.exp() * (teacher - student)).sum(-1).mean())


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen-shannon"])
@pytest.mark.parametrize(("written", "writer"), [(0.0, "student"), (1.0, "student"), (0.5, "teacher")])
def test_the_student_comes_to_the_teacher(divergence: str, written: float, writer: str) -> None:
    how = {"divergence": divergence, "written": written, "writer": writer}
    step = DistillText(epochs=8, batch_size=16, learning_rate=0.4, prompt=2, **how)  # type: ignore[arg-type]
    result = step(start(), Data(train=Text()))
    assert distance(result.module) < 0.5 * distance(start().module)
    assert result.history[-1].name == "distill-text"


def test_sampled_text_follows_the_model_and_keeps_the_prompt() -> None:
    sure = Bigrams(0)
    with torch.no_grad():
        sure.table.fill_(-50.0)
        for token in range(VOCABULARY):
            sure.table[token, (token + 2) % VOCABULARY] = 50.0
    tokens = torch.tensor([[1, 4, 0, 0, 0], [6, 6, 0, 0, 0]])
    assert written(sure.train(), tokens, 2, 1.0).tolist() == [[1, 4, 6, 1, 3], [6, 6, 1, 3, 5]]
    assert sure.training and tokens[0, 2] == 0


def test_frequencies_of_sampled_tokens_are_the_softmax() -> None:
    torch.manual_seed(0)
    model = Bigrams(0, scale=1.0)
    text = written(model, torch.full((20_000, 2), 3), 1, 2.0)
    found = torch.bincount(text[:, 1], minlength=VOCABULARY) / 20_000
    torch.testing.assert_close(found, (model.table[3] / 2).softmax(-1), atol=0.015, rtol=0.0)


def test_jensen_shannon_by_hand() -> None:
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    middle = (p + q) / 2
    expected = float(0.5 * ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()))
    assert float(jensen_shannon_loss(q.log(), p.log(), 1.0)) == pytest.approx(expected, rel=1e-5)
    far = torch.tensor([[100.0, -100.0]])
    assert float(jensen_shannon_loss(far, -far, 1.0)) == pytest.approx(math.log(2), rel=1e-4)
    assert float(reverse_loss(q.log(), p.log(), 1.0)) == pytest.approx(
        float((q * (q / p).log()).sum()), rel=1e-5
    )


def test_only_positions_after_the_prompt_count() -> None:
    """A student that differs from its teacher only after a token of the prompt has nothing to learn."""
    candidate = start()
    student = copy.deepcopy(candidate.original)
    with torch.no_grad():
        student.table[5] += 10 * torch.randn(VOCABULARY)
    text = Text()
    text.tokens = np.where(np.arange(LENGTH) < 2, 5, text.tokens % 5)
    text.tokens[:, 2] = 1
    step = DistillText(epochs=1, prompt=3, written=0.0, optimizer="sgd", weight_decay=0.0)
    result = step(Candidate(student, candidate.inputs, original=candidate.original), Data(train=text))
    torch.testing.assert_close(result.module.table, student.table)


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(ModelError, match="needs a teacher"):
        DistillText()(Candidate(Bigrams(1), start().inputs), Data(train=Text()))
    with pytest.raises(DataError, match="L above prompt"):
        DistillText(prompt=10)(start(), Data(train=Text()))
    with pytest.raises(RecipeError, match="written is 1.5"):
        DistillText(written=1.5)
    with pytest.raises(RecipeError, match="divergence is kl"):
        DistillText(divergence="kl")  # type: ignore[arg-type]
