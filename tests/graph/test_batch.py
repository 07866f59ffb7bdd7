"""The same graph for more samples at a time gives what batch 1 gives, sample by sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecomp.graph import capture
from edgecomp.graph.batch import with_batch


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu6(self.conv(x)).flatten(1))


class Tokens(nn.Module):
    """A class token is concatenated to each sample, heads are split by reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.inner, self.norm = nn.Linear(8, 24), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        heads = self.inner(x).reshape(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape[0], 5, 8)
        return self.norm(x + mixed)[:, 0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


@pytest.mark.parametrize(
    ("module", "shape"),
    [(Convolutional, (3, 8, 8)), (Tokens, (4, 8)), (nn.Tanh, (7,)), (lambda: nn.GroupNorm(2, 4), (4, 3, 3))],
    ids=["convolutional", "tokens", "pointwise", "group norm"],
)
@pytest.mark.parametrize("size", [2, 5])
def test_batched_graph_equals_single_samples(module, shape: tuple[int, ...], size: int) -> None:
    torch.manual_seed(0)
    single = capture(module().eval(), (torch.randn(1, *shape),))
    batched = with_batch(single, size)
    assert batched is not None
    x = torch.randn(size, *shape)
    with torch.no_grad():
        expected = torch.cat([single(x[i : i + 1]) for i in range(size)])
        torch.testing.assert_close(batched(x), expected, rtol=1e-5, atol=1e-5)


def test_a_recurrent_layer_is_batched_rightly_or_not_at_all() -> None:
    single = capture(Recurrent().eval(), (torch.randn(1, 5, 4),))
    batched = with_batch(single, 3)
    x = torch.randn(3, 5, 4)
    if batched is not None:
        with torch.no_grad():
            expected = torch.cat([single(x[i : i + 1]) for i in range(3)])
            torch.testing.assert_close(batched(x), expected)


def test_parameters_are_shared_and_the_original_keeps_its_shapes() -> None:
    single = capture(Convolutional().eval(), (torch.randn(1, 3, 8, 8),))
    batched = with_batch(single, 4)
    assert batched is not None
    assert batched.get_parameter("conv.weight") is single.get_parameter("conv.weight")
    assert single.graph.find_nodes(op="placeholder")[0].meta["val"].shape == (1, 3, 8, 8)
    with torch.no_grad():
        assert single(torch.randn(1, 3, 8, 8)).shape == (1, 5)


class Flattening(nn.Module):
    """The batch is merged into one number: two samples would be mixed."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum().reshape(1, 1)


def test_none_where_batch_and_rows_are_merged() -> None:
    """PyTorch's own attention module works on [rows, batch, features] and merges the first two."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert with_batch(capture(layer, (torch.randn(1, 5, 8),)), 2) is None


def test_none_where_samples_would_be_mixed() -> None:
    assert with_batch(capture(Flattening(), (torch.randn(1, 3),)), 2) is None
