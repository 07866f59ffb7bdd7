"""The demo's float model: a small residual depthwise-separable CNN for 28x28 grey pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("fashion.pt")


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1, with a shortcut where the shape stays (MobileNetV2)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *_conv(inputs, hidden, 1),
            nn.ReLU6(),
            *_conv(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            *_conv(hidden, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class FashionNet(nn.Module):
    """[N, 1, 28, 28] float32, normalized as the sample is -> [N, 10] logits.

    73,546 parameters, 5.8 million multiply-adds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(1, 16, 3), nn.ReLU6())
        self.blocks = nn.Sequential(
            InvertedResidual(16, 32, 3, 2),
            InvertedResidual(32, 32, 3, 1),
            InvertedResidual(32, 56, 3, 2),
            InvertedResidual(56, 56, 3, 1),
            InvertedResidual(56, 56, 3, 1),
        )
        self.head = nn.Sequential(*_conv(56, 160, 1), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.head(self.blocks(self.stem(x))))
        return self.classifier(x.flatten(1))


def build(trained: bool = True) -> nn.Module:
    """The demo model in eval mode, with the weights that `edgecomp/demo/train.py` made, or fresh ones."""
    model = FashionNet()
    if trained:
        weights = torch.load(WEIGHTS, weights_only=True, map_location="cpu")
        model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()
