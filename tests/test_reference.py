"""The float model as a callable of arrays."""

import numpy as np
import pytest
import torch

from edgecomp.errors import ModelError
from edgecomp.reference import TorchReference


class Net(torch.nn.Module):
    def __init__(self, give):
        super().__init__()
        self.give = give

    def forward(self, x):
        if x.shape[0] != 1:
            raise AssertionError("batch of one, as a captured graph has")
        return self.give(x)


X = np.arange(6, dtype=np.float32).reshape(3, 2)


@pytest.mark.parametrize(
    "give, count",
    [(lambda x: x * 2, 1), (lambda x: (x * 2, [x, x]), 3), (lambda x: {"a": x * 2, "b": x.long()}, 2)],
)
def test_outputs_in_order_over_a_batch(give, count):
    found = TorchReference(Net(give))((X,))
    assert len(found) == count
    np.testing.assert_array_equal(found[0], X * 2)


def test_half_becomes_float32_and_integers_stay():
    found = TorchReference(Net(lambda x: (x.half(), x.long())))((X,))
    assert [f.dtype for f in found] == [np.float32, np.int64]


@pytest.mark.parametrize(
    "give, message", [(lambda x: 3, "gives int"), (lambda x: x @ x, "fails on inputs of shape")]
)
def test_failures_are_one_paragraph(give, message):
    with pytest.raises(ModelError, match=message):
        TorchReference(Net(give))((X,))
