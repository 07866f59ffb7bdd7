"""The step quantize-weights, on small models whose layers are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp import checkpoint
from edgecomp.compress.groupwise import QuantizeWeights
from edgecomp.errors import DataError, InputError, ModelError
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.numerics import affine, groupwise
from edgecomp.spec import Batch, Candidate, Data, TensorSpec


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Gated(nn.Module):
    """An embedding, two gated blocks, and a head tied to the embedding."""

    def __init__(self, width: int = 48, hidden: int = 64, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, width)
        self.norms = nn.ModuleList(Norm(width) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.last = Norm(width)
        self.head = nn.Linear(width, 40, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for norm, gate, up, down in zip(self.norms, self.gates, self.ups, self.downs, strict=True):
            y = norm(x)
            x = x + down(torch.nn.functional.silu(gate(y)) * up(y))
        return self.head(self.last(x))


class Tokens:
    labels: tuple[str, ...] = ()
    preprocessing = None

    def __init__(self, count: int = 12, length: int = 16) -> None:
        self.ids = np.random.default_rng(0).integers(0, 40, (count, length))

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int, *, shuffle_seed: int | None = None):
        for start in range(0, len(self.ids), size):
            yield Batch((self.ids[start : start + size],))


def candidate(module: nn.Module) -> Candidate:
    return Candidate(module.eval(), (TensorSpec("ids", (1, 16), "int64"),))


DATA = Data(calibration=Tokens())


def loss(result: Candidate, module: nn.Module) -> float:
    rounded = fake_quantize(result.module, result.quantization)
    with torch.no_grad():
        ids = torch.from_numpy(Tokens().ids)
        return sum(float((rounded(i[None]) - module(i[None])).square().mean()) for i in ids)


def test_every_weight_is_decided_and_the_tied_head_shares_its_integers() -> None:
    module = Gated()
    result = QuantizeWeights(method="rtn", group_size=16)(candidate(module), Data())
    plan = result.quantization
    assert len(plan.weights) == 7 and not plan.float_nodes and not plan.activations
    table = next(q for n, q in plan.weights.items() if n in ("table.weight", "head.weight"))
    assert table.values.shape == (40, 48) and table.scale.shape == (40, 3)
    error = np.abs(affine.dequantize(table.values, table) - module.table.weight.detach().numpy())
    assert error.max() < 0.5 * table.scale.max() * 2.1


def test_a_fallback_is_told_by_name() -> None:
    result = QuantizeWeights(method="rtn", group_size=32)(candidate(Gated()), Data())
    notes = result.history[-1].notes
    assert "gates.0.weight: groups of 16, not groups of 32: 32 does not divide 48 inputs" in notes
    assert not [n for n in notes if n.startswith("downs")]
    assert result.quantization.weights["downs.0.weight"].spec.group_size == 32


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_loses_less_than_nearest(symmetric: bool) -> None:
    module = Gated(tied=False)
    plain, better = (
        QuantizeWeights(method=m, group_size=16, symmetric=symmetric)(candidate(module), DATA)
        for m in ("rtn", "gptq")
    )
    assert loss(better, module) < 0.8 * loss(plain, module)


def test_the_float_graph_still_computes_the_model_after_scaling() -> None:
    module = Gated()
    with torch.no_grad():
        module.norms[0].weight[3] = 9.0
        module.ups[1].weight[5] *= 12
    result = QuantizeWeights(scaling="awq", group_size=16)(candidate(module), DATA)
    ids = torch.from_numpy(DATA.calibration.ids[:1])
    with torch.no_grad():
        torch.testing.assert_close(result.module(ids), module(ids), rtol=1e-4, atol=1e-5)
    changed = dict(result.module.named_parameters()) | dict(result.module.named_buffers())
    assert not torch.equal(changed["norms.0.weight"], module.norms[0].weight)
    assert loss(result, module) < loss(QuantizeWeights(method="rtn", group_size=16)(candidate(module), DATA),
                                       module)  # fmt: skip


def test_hqq_needs_no_data_and_gptq_says_that_it_does() -> None:
    assert QuantizeWeights(method="hqq", group_size=16)(candidate(Gated()), Data()).quantization.weights
    with pytest.raises(DataError, match="needs calibration data"):
        QuantizeWeights()(candidate(Gated()), Data())


def test_embeddings_on_their_own() -> None:
    module = Gated(tied=False)
    eight = QuantizeWeights(method="rtn", group_size=16, embedding_bits=8)(candidate(module), Data())
    assert eight.quantization.weights["table.weight"].spec.bits == 8
    floating = QuantizeWeights(method="rtn", group_size=16, embedding_bits=32)(candidate(module), Data())
    assert "table.weight" not in floating.quantization.weights
    assert "embedding_bits is 32" in floating.quantization.float_nodes.values()


def test_excluded_layers_stay_float() -> None:
    result = QuantizeWeights(method="rtn", group_size=16, exclude=("downs.1",))(candidate(Gated()), Data())
    assert "downs.1.weight" not in result.quantization.weights
    assert list(result.quantization.float_nodes.values()) == ["excluded by 'downs.1'"]


def test_a_checkpoint_brings_the_plan_back(tmp_path: Path) -> None:
    source = tmp_path / "net.py"
    source.write_text("from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(32, 8))\n")
    origin = checkpoint.Origin(f"{source}:make", None)
    begun = Candidate(origin.load(), (TensorSpec("x", (1, 32)),))
    result = QuantizeWeights(method="rtn", group_size=16, symmetric=False)(begun, Data())
    checkpoint.save(result, origin, tmp_path / "c.pt")
    again, _ = checkpoint.load(tmp_path / "c.pt")
    for name, q in result.quantization.weights.items():
        found = again.quantization.weights[name]
        assert found.spec == q.spec
        np.testing.assert_array_equal(found.values, q.values)
        np.testing.assert_array_equal(found.scale, q.scale)


def test_an_interrupted_run_goes_on_with_the_same_result(tmp_path: Path, monkeypatch) -> None:
    step = QuantizeWeights(group_size=16, work=tmp_path / "work")
    first = step(candidate(Gated()), DATA)
    calls = []
    from edgecomp.compress import groupwise as module

    monkeypatch.setattr(module.group_gptq, "rounded", lambda *a: calls.append(a))
    second = step(candidate(Gated()), DATA)
    assert not calls
    for name, q in first.quantization.weights.items():
        np.testing.assert_array_equal(q.values, second.quantization.weights[name].values)


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"method": "best"}, {"bits": 5}, {"group_size": 48}, {"samples": 0}, {"embedding_bits": 5}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} is"):
            QuantizeWeights(**wrong)


def test_nan_inputs_are_refused_with_the_layer() -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.log(x - 5))

    class Ones(Tokens):
        def batches(self, size: int, *, shuffle_seed: int | None = None):
            yield Batch((np.ones((2, 16), np.float32),))

    begun = Candidate(Bad().eval(), (TensorSpec("x", (1, 16)),))
    with pytest.raises(ModelError, match="'a.weight' hold NaN"):
        QuantizeWeights(group_size=16)(begun, Data(calibration=Ones()))


def test_a_model_without_linear_layers_is_named() -> None:
    begun = Candidate(nn.Conv2d(3, 4, 3).eval(), (TensorSpec("x", (1, 3, 8, 8)),))
    with pytest.raises(ModelError, match="no linear layer"):
        QuantizeWeights(method="rtn")(begun, Data())


def test_settings_are_recorded_as_plain_values() -> None:
    result = QuantizeWeights(method="rtn", group_size=None)(candidate(Gated()), Data())
    assert result.history[-1].settings["group_size"] is None
    assert set(result.history[-1].settings) == {f.name for f in dataclasses.fields(QuantizeWeights)}
    assert groupwise.in_groups(result.quantization.weights["gates.0.weight"])[2] == 48
