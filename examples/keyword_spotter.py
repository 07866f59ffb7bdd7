"""A keyword spotter for a Raspberry Pi: log-mel pictures of one second, a depthwise-separable CNN.

    edgecomp run examples/keyword_spotter.yaml

No speech is needed: the six "words" are sequences of two gliding tones, at random pitch, speed and place in
noise, made here from a seed. The features are those of real recordings, 49 frames of 40 mel bands; put a
folder of WAV files in their place for real words. The float model is trained on first use, in about half a
minute, and kept in build/examples.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp import files
from edgecomp.calibration_data.base import IndexedSource
from edgecomp.compress.train import Finetune
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec

RATE, FRAME, STEP, BANDS, FRAMES = 8000, 256, 160, 40, 49
WORDS = ("up-up", "up-down", "down-up", "down-down", "up-flat", "flat-down")
WEIGHTS = Path("build/examples/keyword_spotter.pt")
_SLOPES = {"up": 1.0, "down": -1.0, "flat": 0.0}


def sound(word: int, rng: np.random.Generator) -> np.ndarray:
    """One second at 8 kHz, float64 [8000]."""
    pitch, length = rng.uniform(300, 900), int(rng.uniform(0.25, 0.4) * RATE)
    parts = []
    for slope in WORDS[word].split("-"):
        hertz = pitch * 2.0 ** (_SLOPES[slope] * np.linspace(0.0, 0.8, length))
        parts.append(np.sin(2 * np.pi * np.cumsum(hertz) / RATE) * np.hanning(length))
    spoken = np.concatenate(parts)
    result = rng.normal(scale=rng.uniform(0.8, 2.4), size=RATE)
    start = rng.integers(0, RATE - len(spoken) + 1)
    result[start : start + len(spoken)] += spoken
    return result


@cache
def mel_bands() -> np.ndarray:
    """Triangles, evenly spaced on the mel scale: [129, 40]."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    bins = np.arange(FRAME // 2 + 1) * RATE / FRAME
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return np.clip(np.minimum(rising, falling), 0, None)


def features(wave: np.ndarray) -> np.ndarray:
    """Log-mel energies [1, 49, 40] float32, roughly of zero mean and unit spread."""
    starts = np.arange(FRAMES) * STEP
    frames = wave[starts[:, None] + np.arange(FRAME)] * np.hanning(FRAME)
    energy = np.abs(np.fft.rfft(frames)) ** 2 @ mel_bands()
    return ((np.log(energy + 1e-2) - 1.5) / 2.0)[None].astype(np.float32)


class Words(IndexedSource):
    """`count` sounds of a seed, every word as often."""

    labels: tuple[str, ...] = WORDS
    preprocessing: Preprocessing | None = None

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.targets = np.arange(count) % len(WORDS)
        self.inputs = np.stack([features(sound(int(word), rng)) for word in self.targets])

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, indices: np.ndarray) -> Batch:
        return Batch((self.inputs[indices],), self.targets[indices])


@cache
def train() -> Words:
    return Words(1800, seed=0)


@cache
def calibration() -> Words:
    return Words(120, seed=1)


@cache
def evaluation() -> Words:
    return Words(600, seed=2)


class Spotter(nn.Module):
    """[N, 1, 49, 40] -> [N, 6], after DS-CNN (Zhang et al. 2017, "Hello Edge")."""

    def __init__(self, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, (10, 4), 2, (4, 1), bias=False)]
        for _ in range(depth):
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.ReLU(), nn.Conv2d(width, width, 1, bias=False)]
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, len(WORDS))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.layers(x)).flatten(1))


def build() -> nn.Module:
    """The trained float model in eval mode."""
    model = Spotter().eval()
    if not WEIGHTS.is_file():
        torch.manual_seed(0)
        start = Candidate(Spotter().eval(), (TensorSpec("x", (1, 1, FRAMES, BANDS), layout="NCHW"),))
        settings = Finetune(epochs=6, batch_size=32, learning_rate=4e-3)
        with files.atomic(WEIGHTS) as temporary:
            torch.save(settings(start, Data(train=train())).module.state_dict(), temporary)
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return model
