"""KL divergence and top-k agreement by hand and beside SciPy; typing errors; metrics of others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from edgecomp.calibration_data.typos import NEIGHBOURS, typos
from edgecomp.errors import DataError, InputError
from edgecomp.parity import corrupted, metric_named
from edgecomp.parity.distribution import DistributionTally, log_probabilities
from edgecomp.parity.flips import save_inputs
from edgecomp.parity.metric import Accuracy
from edgecomp.parity.metric_adapters import FromTorchmetrics, adapted
from edgecomp.spec import Batch, Preprocessing


def test_divergence_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 log 2 + 1/2 log 2/3 = 1/2 log 4/3."""
    tally = DistributionTally(k=1)
    tally.add(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]]), None)
    facts = tally.facts()
    assert facts is not None and facts["kl"] == pytest.approx(0.5 * np.log(4 / 3))
    assert facts["positions"] == 1 and facts["top1"] == 0.0 and facts["top_k"] in (0.0, 1.0)


def test_divergence_beside_scipy_over_tokens_without_padding() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, 50)), rng.normal(size=(2, 4, 50))
    targets = np.array([[1, 2, 3, -100], [1, -100, -100, -100]])
    tally = DistributionTally()
    tally.add(a, b, targets)
    kept = targets >= 0
    p, q = scipy.special.softmax(a, -1)[kept], scipy.special.softmax(b, -1)[kept]
    facts = tally.facts()
    assert facts is not None and facts["positions"] == 4
    assert facts["kl"] == pytest.approx(scipy.stats.entropy(p, q, axis=-1).mean())
    best = [set(np.argsort(-x)[:5]) for x in p], [set(np.argsort(-x)[:5]) for x in q]
    assert facts["top_k"] == pytest.approx(np.mean([len(x & y) / 5 for x, y in zip(*best, strict=True)]))
    assert facts["top1"] == np.mean(p.argmax(-1) == q.argmax(-1))


def test_the_same_scores_have_no_divergence_and_distributions_are_not_softmaxed_again() -> None:
    p = scipy.special.softmax(np.random.default_rng(1).normal(size=(6, 9)), -1)
    tally = DistributionTally()
    tally.add(p, p, None)
    facts = tally.facts()
    assert facts is not None and facts["kl"] == 0 and (facts["top1"], facts["top_k"]) == (1.0, 1.0)
    np.testing.assert_allclose(np.exp(log_probabilities(p)), p)
    assert np.isfinite(log_probabilities(np.array([[1.0, 0.0]]))).all()


def test_pictures_and_single_values_have_no_distribution() -> None:
    tally = DistributionTally()
    for shape in ((2, 3, 4, 4), (2, 1), (2,)):
        tally.add(np.zeros(shape), np.zeros(shape), None)
    assert tally.facts() is None


# Typing errors


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_only_letters_are_mistyped(text: str, severity: int, seed: int) -> None:
    changed = typos(text, severity, np.random.default_rng(seed))
    assert [c for c in changed if not c.isalpha()] == [c for c in text if not c.isalpha()]
    assert changed == typos(text, severity, np.random.default_rng(seed))


def test_more_severe_is_more_errors() -> None:
    text = "the quick brown fox jumps over the lazy dog " * 50
    lengths = []
    for severity in range(1, 6):
        changed = typos(text, severity, np.random.default_rng(0))
        lengths.append(sum(a != b for a, b in zip(text.split(), changed.split(), strict=False)))
    assert lengths == sorted(lengths) and 0 < lengths[0] < lengths[-1]


def test_the_keyboard() -> None:
    assert set(NEIGHBOURS["g"]) == set("fhtyvb") and set(NEIGHBOURS["q"]) == set("wa")
    assert all(a in NEIGHBOURS[b] for a in NEIGHBOURS for b in NEIGHBOURS[a])


class Texts:
    """Three texts; a token is a character's number, texts are padded to 12."""

    labels: tuple[str, ...] = ("no", "yes")
    preprocessing: Preprocessing | None = None
    texts = ("good morning", "bad", "hello there")

    def __len__(self) -> int:
        return len(self.texts)

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(c) for c in text.ljust(12)[:12]], np.int64)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        tokens = np.stack([self.encode(t) for t in self.texts])
        yield Batch((tokens,), np.array([1, 0, 1]), tuple({"text": t} for t in self.texts))


def test_texts_are_mistyped_and_encoded_again() -> None:
    source = Texts()
    assert corrupted.names_for(source) == ["typos"]
    corrupted.check(source, "typos")
    clean = next(iter(source.batches(3))).inputs[0]
    first = next(iter(corrupted.corrupted(source, "typos", 5).batches(3)))
    again = next(iter(corrupted.corrupted(source, "typos", 5).batches(3)))
    assert first.inputs[0].shape == clean.shape and (first.inputs[0] != clean).any()
    np.testing.assert_array_equal(first.inputs[0], again.inputs[0])
    assert first.rows[0]["text"] == "good morning"


def test_typos_say_what_they_need() -> None:
    class Mute:
        labels, preprocessing = Texts.labels, None

        def __len__(self) -> int:
            return 3

        def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
            yield from Texts().batches(size)

    with pytest.raises(DataError, match="no method encode"):
        corrupted.check(Mute(), "typos")


def test_a_flip_of_a_text_is_written_as_text(tmp_path: Path) -> None:
    saved = save_inputs([{"index": 2, "input": None}], Texts(), tmp_path)
    assert saved[0]["input"] == "flip-2.txt"
    assert (tmp_path / "flip-2.txt").read_text() == "hello there\n"


# Metrics of others


def test_torchmetrics_gives_what_torchmetrics_gives() -> None:
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(40, 3)).astype(np.float32), rng.integers(0, 3, 40)
    metric = FromTorchmetrics(MulticlassF1Score(num_classes=3, average="macro"))
    states = np.concatenate(
        [metric.states([scores[:25]], targets[:25]), metric.states([scores[25:]], targets[25:])]
    )
    expected = torchmetrics.functional.classification.multiclass_f1_score(
        torch.from_numpy(scores), torch.from_numpy(targets), num_classes=3, average="macro"
    )
    assert metric.value(states) == pytest.approx(float(expected))
    assert metric.name == "multiclassf1score" and metric.higher_is_better


def test_torchmetrics_accuracy_is_ours() -> None:
    rng = np.random.default_rng(1)
    scores, targets = rng.normal(size=(30, 4)).astype(np.float32), rng.integers(0, 4, 30)
    theirs = FromTorchmetrics(MulticlassAccuracy(num_classes=4, average="micro"))
    ours = Accuracy()
    values = [m.value(m.states([scores], targets)) for m in (theirs, ours)]
    assert values[0] == pytest.approx(values[1])


def test_a_metric_from_a_user_s_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torchmetrics.classification import MulticlassF1Score\n"
        "def f1():\n    return MulticlassF1Score(num_classes=3)\n"
        "def wrong():\n    return 3\n"
    )
    assert metric_named.by_name(f"{tmp_path}/mine.py:f1").name == "multiclassf1score"
    with pytest.raises(InputError, match="gives a int; expected a torchmetrics metric"):
        metric_named.by_name(f"{tmp_path}/mine.py:wrong")
    with pytest.raises(InputError, match="no Python file"):
        metric_named.by_name(f"{tmp_path}/none.py:f1")
    assert adapted(Accuracy(), "a") == Accuracy()


def test_a_torchmetrics_metric_that_refuses_is_named() -> None:
    metric = FromTorchmetrics(MulticlassAccuracy(num_classes=4))
    states = metric.states([np.zeros((2, 7), np.float32)], np.zeros((2, 3), np.int64))
    with pytest.raises(InputError, match="multiclassaccuracy does not take outputs"):
        metric.value(states)
