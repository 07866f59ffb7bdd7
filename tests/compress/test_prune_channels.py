"""A pruned model must equal the original with the same channels cut out by zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecomp.compress import prune_groups
from edgecomp.compress.macs import count_macs, count_parameters
from edgecomp.compress.prune import PruneChannels, prunable, remove, rounded
from edgecomp.demo.model import FashionNet
from edgecomp.errors import DataError, ModelError, RecipeError
from edgecomp.spec import Candidate, Data, TensorSpec


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x + self.norm(self.b(x))
        return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.depthwise = nn.Conv2d(16, 32, 3, groups=16)
        self.squeeze = nn.Conv2d(32, 8, 1)
        self.excite = nn.Conv2d(8, 32, 1)
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depthwise(F.relu(self.conv(x))), inplace=True)
        x = x * self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head(x).mean((2, 3))


class Concatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(3, 24, 3, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(32, 12, 2, stride=2)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(F.relu(self.up(F.relu(self.grouped(x))))).amax((2, 3))


class Shuffle(nn.Module):
    """As in ShuffleNet: channels are cut into groups and dealt out anew."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 1)
        self.grouped = nn.Conv2d(12, 12, 3, groups=3)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(self.a(x)))
        n, channels, height, width = x.shape
        x = x.view(n, 3, channels // 3, height, width).transpose(1, 2).reshape(n, channels, height, width)
        return self.head(x).mean((2, 3))


class SelectiveKernel(nn.Module):
    """As in SKNet: weights of two paths stand side by side in one layer's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.paths = nn.ModuleList([nn.Conv2d(8, 10, 3, padding=d, dilation=d) for d in (1, 2)])
        self.reduce, self.select = nn.Conv2d(10, 6, 1), nn.Conv2d(6, 20, 1)
        self.head = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        paths = torch.stack([path(x) for path in self.paths], dim=1)
        weights = self.select(F.relu(self.reduce(paths.sum(1).mean((2, 3), keepdim=True))))
        n, channels, height, width = weights.shape
        weights = weights.view(n, 2, channels // 2, height, width).softmax(dim=1)
        return self.head((paths * weights).sum(dim=1)).mean((2, 3))


class WrittenWidth(nn.Module):
    """Cuts channels into parts of a width that its code writes as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(6, 4)
        self.head = nn.Linear(8, 2)
        self.c = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).view(len(x), -1, 8).sum(1) + self.c(F.relu(self.b(x))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.input = nn.Linear(6, 12)
        self.rnn = kind(12, 10, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(F.relu(self.input(x)))[0][:, -1])


class FusedAttention(nn.Module):
    """As in ViT: one projection for queries, keys and values, cut into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = 4, 6, 24
        self.embed = nn.Linear(6, 20)
        self.qkv = nn.Linear(20, 72)
        self.proj = nn.Linear(24, 20)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, length, _ = x.shape
        q, k, v = (
            self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        )
        attention = (q @ k.transpose(-2, -1) / 6**0.5).softmax(dim=-1)
        x = x + self.proj((attention @ v).transpose(1, 2).reshape(n, length, self.attn_dim))
        return self.head(x.mean(1))


class GroupedQuery(nn.Module):
    """As in Llama: four query heads share one key and value head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = 8, 2
        self.q, self.k, self.v = nn.Linear(6, 32), nn.Linear(6, 8), nn.Linear(6, 8)
        self.proj = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q(x).view(n, length, self.num_heads, 4).transpose(1, 2)
        k, v = (
            layer(x).view(n, length, self.num_key_value_heads, 4).transpose(1, 2)[:, :, None]
            .expand(n, self.num_key_value_heads, 4, length, 4)
            .reshape(n, self.num_key_value_heads * 4, length, 4)
            for layer in (self.k, self.v)
        )  # fmt: skip
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, length, -1)).mean(1)


class FixedWidth(nn.Module):
    """Its own code holds a channel count that no trace shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(8, 16)
        self.c = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if x.shape[-1] != 8:
            raise ValueError("expected 8 features")
        return self.c(F.relu(self.b(x)))


IMAGE = (1, 3, 12, 12)
CASES = {
    "residual": (Residual, IMAGE),
    "squeeze-excite": (SqueezeExcite, IMAGE),
    "concatenation": (Concatenation, IMAGE),
    "shuffle": (Shuffle, IMAGE),
    "selective-kernel": (SelectiveKernel, IMAGE),
    "lstm": (lambda: Recurrent(nn.LSTM), (1, 5, 6)),
    "gru": (lambda: Recurrent(nn.GRU), (1, 5, 6)),
    "attention": (FusedAttention, (1, 5, 6)),
    "grouped-query": (GroupedQuery, (1, 5, 6)),
    "demo": (FashionNet, (1, 1, 28, 28)),
}


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data = torch.rand(layer.weight.shape, generator=generator) + 0.5
            layer.bias.data = torch.randn(layer.bias.shape, generator=generator) * 0.2
            layer.running_mean = torch.randn(layer.bias.shape, generator=generator) * 0.2
    return module.eval()


def cut(module: nn.Module, removed: list[tuple[prune_groups.Group, np.ndarray]]) -> nn.Module:
    """The same module with zeros in every position that pruning takes away."""
    result = copy.deepcopy(module)
    tensors = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    for group, units in removed:
        for unit in units:
            for (name, axis), positions in group.members[int(unit)].items():
                if not name.endswith("running_var") and "#" not in name:
                    tensors[name].data.index_fill_(axis, torch.tensor(positions), 0.0)
    return result


@pytest.mark.parametrize("case", CASES)
def test_pruned_equals_the_original_with_zeros(case: str) -> None:
    build, shape = CASES[case]
    torch.manual_seed(0)
    module = randomized(build())
    x = torch.randn(shape)
    analysis = prunable(module, (x,))
    rng = np.random.default_rng(1)
    removed = [(g, rng.permutation(len(g))[: max(1, len(g) // 3)]) for g in analysis.groups]
    pruned = copy.deepcopy(module)
    remove(pruned, removed)
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), cut(module, removed)(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in module.parameters())


def test_groups_couple_what_an_addition_joins() -> None:
    analysis = prune_groups.analyse(Residual().eval(), (torch.zeros(IMAGE),))
    (group,) = analysis.groups
    assert set(group.members[0]) >= {("a.weight", 0), ("b.weight", 0), ("b.weight", 1), ("norm.weight", 0)}
    assert group.members[2][("head.weight", 1)] == tuple(range(32, 48))
    assert analysis.kept == {"head": "is an output of the model"}


def test_grouped_convolution_loses_the_same_channel_of_every_group() -> None:
    analysis = prune_groups.analyse(Concatenation().eval(), (torch.zeros(IMAGE),))
    outputs = next(g for g in analysis.groups if ("grouped.weight", 0) in g.producers)
    assert outputs.members[0][("grouped.weight", 0)] == (0, 8, 16, 24)
    assert outputs.channels == 32 and len(outputs) == 8


def test_query_heads_go_with_the_key_head_that_they_share() -> None:
    module = GroupedQuery().eval()
    (group,) = prune_groups.analyse(module, (torch.zeros(1, 5, 6),)).groups
    assert group.members[1][("k.weight", 0)] == (4, 5, 6, 7)
    assert group.members[1][("q.weight", 0)] == tuple(range(16, 32))
    remove(module, [(group, np.array([0]))])
    assert (module.num_heads, module.num_key_value_heads) == (4, 1)


def test_the_module_still_trains_and_reports_its_own_shapes() -> None:
    module = randomized(SqueezeExcite())
    candidate = Candidate(module, (TensorSpec("x", IMAGE),))
    pruned = PruneChannels(sparsity=0.5, round_to=4)(candidate, Data()).module
    assert (pruned.conv.out_channels, pruned.depthwise.groups, pruned.depthwise.out_channels) == (8, 8, 16)
    assert module.conv.out_channels == 16
    pruned.train()(torch.randn(2, 3, 12, 12)).sum().backward()
    assert pruned.conv.weight.grad is not None and pruned.conv.weight.grad.shape == (8, 3, 3, 3)


def test_lowest_l1_norms_go() -> None:
    module = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 1.0], [0.1, 0.1], [2.0, 2.0], [0.2, 0.2]]))
        module[2].weight.fill_(0.5)
    candidate = Candidate(module.eval(), (TensorSpec("x", (1, 2)),))
    pruned = PruneChannels(sparsity=0.5, criterion="l1", round_to=1)(candidate, Data()).module
    assert torch.equal(pruned[0].weight, torch.tensor([[1.0, 1.0], [2.0, 2.0]]))


def test_macs_budget_holds_and_channels_are_rounded() -> None:
    module = randomized(FashionNet())
    candidate = Candidate(module, (TensorSpec("x", (1, 1, 28, 28)),))
    result = PruneChannels(macs=0.6)(candidate, Data())
    x = torch.zeros(1, 1, 28, 28)
    assert 0.4 < count_macs(result.module, (x,)) / count_macs(module, (x,)) <= 0.6
    assert all(m.out_channels % 8 == 0 for m in result.module.modules() if isinstance(m, nn.Conv2d))
    assert result.history[-1].notes[-1] == "classifier not pruned: is an output of the model"
    assert result.original is module


def test_what_the_own_code_forbids_is_kept_with_the_reason() -> None:
    candidate = Candidate(FixedWidth().eval(), (TensorSpec("x", (1, 6)),))
    result = PruneChannels(sparsity=0.5, round_to=4)(candidate, Data())
    assert result.module.a.out_features == 8 and result.module.b.out_features == 8
    assert any("a not pruned" in n and "expected 8 features" in n for n in result.history[-1].notes)


def test_parts_of_a_width_that_the_code_writes_stay() -> None:
    analysis = prunable(WrittenWidth().eval(), (torch.zeros(1, 6),))
    assert [g.producers for g in analysis.groups] == [(("b.weight", 0),)]
    assert "does not run with fewer channels" in analysis.kept["a"]


def test_macs_are_counted_where_a_module_is_given_a_parameter() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.linear = nn.Parameter(torch.ones(1, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.token) + x

    module = Given().eval()
    assert count_macs(module, (torch.zeros(1, 2),)) == 8 and module.token.requires_grad


def test_a_rule_by_name_goes_before_one_by_type_and_both_before_the_setting() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.Flatten(),
        nn.Linear(1024, 16),
        nn.Linear(16, 2),
    )
    candidate = Candidate(module.eval(), (TensorSpec("x", IMAGE),))
    rules = {"type:Conv2d": 0.25, "2": 0.0}
    pruned = PruneChannels(sparsity=0.5, round_to=4, rules=rules)(candidate, Data()).module
    assert [pruned[i].weight.shape[0] for i in (0, 2, 4)] == [12, 16, 8]


def test_macs_of_a_convolution_by_hand() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 2))
    assert count_macs(module, (torch.zeros(1, 3, 4, 4),)) == 3 * 9 * 8 * 16 + 8 * 16 * 2


@pytest.mark.parametrize("kind, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_macs_of_recurrent_layers_by_hand(kind: Callable[..., nn.Module], gates: int) -> None:
    module = kind(8, 16, num_layers=2, bidirectional=True, batch_first=True)
    first, second = 8 + 16, 2 * 16 + 16  # what each of the cell's units reads, in both layers
    assert count_macs(module, (torch.zeros(1, 10, 8),)) == 2 * 10 * gates * 16 * (first + second)


def test_half_of_an_lstm() -> None:
    start = Candidate(Recurrent(nn.LSTM).eval(), (TensorSpec("x", (1, 5, 6)),))
    pruned = PruneChannels(macs=0.5, round_to=1)(start, Data())
    zeros = (torch.zeros(1, 5, 6),)
    assert 0.35 < count_macs(pruned.module, zeros) / count_macs(start.module, zeros) <= 0.5


@pytest.mark.parametrize("params", [0.5, 2000])
def test_a_budget_of_parameters(params: float) -> None:
    module = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.Flatten())
    start = Candidate(module.eval(), (TensorSpec("x", IMAGE),))
    pruned = PruneChannels(params=params, round_to=1)(start, Data())
    before, after = (count_parameters(m)[0] for m in (module, pruned.module))
    assert before == 32 * 28 + 16 * 289
    budget = params * before if params < 1 else params
    assert 0.9 * budget < after <= budget
    assert pruned.history[-1].notes[1] == f"parameters {before:,} -> {after:,}"


def test_a_budget_of_parameters_that_cannot_be_met() -> None:
    start = Candidate(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).eval(), (TensorSpec("x", (1, 4)),))
    with pytest.raises(ModelError, match="parameters remain at max_sparsity 0.5, the budget is 10 of"):
        PruneChannels(params=10, max_sparsity=0.5)(start, Data())
    with pytest.raises(RecipeError, match="expected one of the three"):
        PruneChannels(params=10, macs=0.5)


@pytest.mark.parametrize(
    ("units", "gone", "step", "width", "expected"),
    [(64, 19, 8, 1, 16), (20, 6, 8, 1, 4), (8, 4, 8, 1, 0), (16, 8, 8, 4, 8), (100, 99, 1, 1, 90)],
)
def test_rounding_by_hand(units: int, gone: int, step: int, width: int, expected: int) -> None:
    assert rounded(units, gone, step, width, 0.9) == expected


def test_bad_settings_and_models() -> None:
    with pytest.raises(RecipeError, match="expected one of the three"):
        PruneChannels()
    with pytest.raises(RecipeError, match="criterion is l3"):
        PruneChannels(sparsity=0.1, criterion="l3")  # type: ignore[arg-type]
    candidate = Candidate(nn.Linear(4, 2), (TensorSpec("x", (1, 4)),))
    with pytest.raises(ModelError, match="no channel of Linear can be removed"):
        PruneChannels(sparsity=0.5)(candidate, Data())
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).eval()
    candidate = Candidate(module, (TensorSpec("x", (1, 4)),))
    with pytest.raises(RecipeError, match="needs a batch normalization"):
        PruneChannels(sparsity=0.5, criterion="bn_scale", round_to=1)(candidate, Data())
    with pytest.raises(DataError, match="labelled training data"):
        PruneChannels(sparsity=0.5, criterion="taylor", round_to=1)(candidate, Data())
    with pytest.raises(RecipeError, match="'blocks.*' matches no layer"):
        PruneChannels(sparsity=0.5, exclude=("blocks.*",))(candidate, Data())
    with pytest.raises(ModelError, match="remain at max_sparsity"):
        PruneChannels(macs=0.01, round_to=1)(candidate, Data())
