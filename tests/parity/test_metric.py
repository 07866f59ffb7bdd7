"""Task metrics against numbers by hand and against scipy."""

import numpy as np
import pytest
from scipy import stats

from edgecomp.errors import DataError, UnknownNameError
from edgecomp.parity import metric_named
from edgecomp.parity.metric import Accuracy, RootMeanSquare, difference_interval, infer
from edgecomp.parity.metric_more import AveragePrecision, MeanIoU, Perplexity, RankCorrelation, RecallAtK

RNG = np.random.default_rng(4)


def value(metric, outputs, targets):
    return metric.value(metric.states([np.asarray(outputs, np.float32)], np.asarray(targets)))


def test_accuracy_and_top_k():
    scores = [[0.1, 0.5, 0.4], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]
    assert value(Accuracy(), scores, [1, 1, 2]) == pytest.approx(2 / 3)
    assert value(Accuracy(2), scores, [2, 2, 0]) == pytest.approx(2 / 3)
    assert Accuracy(5).name == "top5_accuracy"


def test_rmse():
    assert value(RootMeanSquare(), [[1.0], [3.0]], [1.0, 0.0]) == pytest.approx(np.sqrt(4.5))


def test_mean_iou_by_hand():
    """Class 0: 1 both of 2; class 1: 1 both of 2, one pixel ignored; class 2 is nowhere."""
    predicted = np.array([[[0, 0], [1, 1]]])
    scores = np.eye(3)[predicted].transpose(0, 3, 1, 2)
    assert value(MeanIoU(), scores, [[[0, 1], [1, 255]]]) == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_mean_iou_sums_before_dividing():
    predicted = np.array([[[0, 0, 0, 0]], [[0, 1, 1, 1]]])
    scores = np.eye(2)[predicted].transpose(0, 3, 1, 2)
    targets = np.array([[[0, 0, 0, 1]], [[1, 1, 1, 1]]])
    # class 0: 3 of 5, class 1: 3 of 5
    assert value(MeanIoU(), scores, targets) == pytest.approx(0.6)


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    assert value(Perplexity(), np.zeros((2, 3, 50)), [[1, 2, 3], [4, -100, -100]]) == pytest.approx(50)


def test_perplexity_by_hand():
    """Probabilities 1/4 and 1/2: exp((ln 4 + ln 2) / 2) = sqrt 8."""
    scores = np.log([[[0.25, 0.75], [0.5, 0.5]]])
    assert value(Perplexity(), scores, [[0, 1]]) == pytest.approx(np.sqrt(8), rel=1e-6)


def test_recall_at_k_by_hand():
    vectors = [[1, 0], [0.9, 0.1], [0, 1], [0.5, 0.6]]
    assert value(RecallAtK(1), vectors, [0, 0, 1, 1]) == pytest.approx(1)
    assert value(RecallAtK(1), vectors, [0, 1, 0, 1]) == pytest.approx(0)
    assert value(RecallAtK(3), vectors, [0, 1, 0, 1]) == pytest.approx(1)


def test_rank_correlation_is_scipys():
    x, y = RNG.integers(0, 8, 60), RNG.integers(0, 8, 60)
    assert value(RankCorrelation(), x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_average_precision_by_hand():
    """2 true boxes. By score: hit (1/1, recall 1/2), miss, hit (2/3, recall 1): 1/2 + 1/2 * 2/3."""
    found = [[[0, 0, 10, 10, 0.9, 0], [50, 50, 60, 60, 0.8, 0], [20, 20, 30, 31, 0.7, 0], [0, 0, 1, 1, 0, 0]]]
    truth = [[[0, 0, 10, 10, 0], [20, 20, 30, 30, 0], [0, 0, 0, 0, -1]]]
    assert value(AveragePrecision(), found, truth) == pytest.approx(5 / 6)
    assert value(AveragePrecision(0.95), found, truth) == pytest.approx(1 / 2)


def test_a_true_box_is_found_once():
    found = [[[0, 0, 10, 10, 0.9, 0], [0, 0, 10, 10, 0.8, 0]]]
    assert value(AveragePrecision(), found, [[[0, 0, 10, 10, 0]]]) == pytest.approx(1)
    metric = AveragePrecision()
    hits = metric.states([np.array(found)], np.array([[[0, 0, 10, 10, 0]]]))[0][0][:, 2]
    np.testing.assert_array_equal(hits, [1, 0])


@pytest.mark.parametrize(
    "outputs, targets, name",
    [
        ((5, 3), np.zeros(5, int), "accuracy"),
        ((5, 1), np.zeros(5, np.float32), "rmse"),
        ((5, 3, 4, 4), np.zeros((5, 4, 4), int), "miou"),
        ((5, 7, 30), np.zeros((5, 7), int), "perplexity"),
        ((5, 7, 30), np.zeros((5, 3), int), None),
        ((5, 3), None, None),
    ],
)
def test_inferred(outputs, targets, name):
    found = infer([np.zeros(outputs, np.float32)], targets)
    assert (found.name if found else None) == name


@pytest.mark.parametrize("name", sorted(metric_named.NAMED))
def test_wrong_shapes_are_one_paragraph(name):
    metric = metric_named.by_name(name)
    with pytest.raises(DataError, match="needs outputs"):
        metric.states([np.zeros((3, 4, 5, 6, 7), np.float32)], np.zeros((2, 2, 2), int))


def test_unknown_name():
    with pytest.raises(UnknownNameError, match="did you mean 'accuracy'"):
        metric_named.by_name("acuracy")


def test_interval_of_a_binary_metric_is_tangos_and_of_another_a_bootstrap():
    reference, test = np.ones((50, 1)), np.ones((50, 1))
    low, high = difference_interval(Accuracy(), reference, test)
    assert low == pytest.approx(-high) and high == pytest.approx(3.8415 / 53.8415, abs=1e-4)
    errors = RNG.uniform(1, 2, (50, 1))
    low, high = difference_interval(RootMeanSquare(), errors, errors + 1)
    assert 0 < low < high
