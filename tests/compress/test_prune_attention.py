"""Heads of PyTorch's own attention: the opened form computes the same, and heads really go."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp import checkpoint
from edgecomp.compress.attention import Heads, open_heads, opened
from edgecomp.compress.prune import PruneChannels, prunable, remove
from edgecomp.spec import Candidate, Data, TensorSpec

NET = """\
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2, enable_nested_tensor=False)
        self.cross = nn.MultiheadAttention(32, 4)
        self.head = nn.Linear(32, 3)
    def forward(self, x):
        x = self.encoder(self.embed(x)).transpose(0, 1)
        x = x + self.cross(x, x[:2], x[:2], need_weights=False)[0]
        return self.head(x.mean(0))
def build():
    torch.manual_seed(0)
    return Net().eval()
"""


@pytest.fixture
def built(tmp_path: Path) -> tuple[str, nn.Module]:
    (tmp_path / "net.py").write_text(NET)
    spec = f"{tmp_path / 'net.py'}:build"
    return spec, checkpoint.Origin(spec).load()


def both(**settings: object) -> tuple[nn.MultiheadAttention, Heads]:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, **settings).eval()  # type: ignore[arg-type]
    nn.init.normal_(layer.in_proj_bias) if layer.in_proj_bias is not None else None
    return layer, Heads(layer)


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))


CAUSAL = torch.ones(5, 5).triu(1).bool()
PADDING = torch.arange(5).expand(2, 5) > 3
FIRST: dict[str, object] = {"batch_first": True}
CASES: dict[str, tuple[dict[str, object], tuple[int, ...], dict[str, object]]] = {
    "plain": (FIRST, (2, 5, 12), {}),
    "length first": ({}, (5, 2, 12), {}),
    "one sequence": ({}, (5, 12), {}),
    "no bias": ({"bias": False}, (5, 2, 12), {"need_weights": False}),
    "padding": (FIRST, (2, 5, 12), {"key_padding_mask": PADDING}),
    "causal": (FIRST, (2, 5, 12), {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "both masks": (FIRST, (2, 5, 12), {"attn_mask": CAUSAL, "key_padding_mask": PADDING}),
    "mask by head": (FIRST, (2, 5, 12), {"attn_mask": inputs(6, 5, 5), "average_attn_weights": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_opened_form_computes_what_torch_computes(case: str) -> None:
    settings, shape, arguments = CASES[case]
    layer, heads = both(**settings)
    x = inputs(*shape)
    expected, weights = layer(x, x, x, **arguments)
    found, own = heads(x, x, x, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if weights is not None:
        torch.testing.assert_close(own, weights, rtol=1e-5, atol=1e-6)


def test_removed_heads_are_as_heads_of_zeros(built: tuple[str, nn.Module]) -> None:
    module = copy.deepcopy(built[1])
    open_heads(module)
    assert opened(module) == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "cross"]
    x = inputs(1, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(module(x), built[1](x), rtol=1e-5, atol=1e-5)
    groups = [g for g in prunable(module, (x,)).groups if "in_proj_weight" in g.producers[0][0]]
    assert len(groups) == 3 and all(len(g) == 4 for g in groups)
    zeroed, pruned = copy.deepcopy(module), copy.deepcopy(module)
    for layer in (zeroed.encoder.layers[0].self_attn, zeroed.encoder.layers[1].self_attn, zeroed.cross):
        layer.out_proj.weight.data[:, 8:16] = 0.0  # head 1 of four, 8 channels each
    remove(pruned, [(g, np.array([1])) for g in groups])
    assert pruned.cross.num_heads == 3 and pruned.cross.in_proj_weight.shape == (72, 32)
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), zeroed(x), rtol=1e-4, atol=1e-5)


def test_a_pruned_model_comes_back_from_its_checkpoint(built: tuple[str, nn.Module], tmp_path: Path) -> None:
    spec, module = built
    start = Candidate(module, (TensorSpec("x", (1, 5, 6)),), original=module)
    pruned = PruneChannels(sparsity=0.5)(start, Data())
    assert pruned.module.cross.num_heads == 2 and isinstance(start.module.cross, nn.MultiheadAttention)
    checkpoint.save(pruned, checkpoint.Origin(spec), tmp_path / "a.pt")
    again, _ = checkpoint.load(tmp_path / "a.pt")
    x = inputs(1, 5, 6)
    with torch.no_grad():
        assert torch.equal(again.module(x), pruned.module(x))
    pruned.module.train()(x).sum().backward()


def test_other_widths_of_keys_stay_as_they_are() -> None:
    module = nn.Sequential(
        nn.MultiheadAttention(12, 3, kdim=6), nn.MultiheadAttention(12, 3, add_bias_kv=True)
    )
    open_heads(module)
    assert opened(module) == []
