"""Equal constants of many layers (rotations, masks) are in the file once; weights keep their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from edgecomp.exporters.onnx import OnnxExporter
from edgecomp.graph import capture
from edgecomp.spec import Candidate, Data, TensorSpec


class Layer(nn.Module):
    """A linear layer and a mask that every layer computes anew."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        nn.init.constant_(self.fc.weight, 0.01)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(self.width)
        mask = torch.where(steps[:, None] >= steps[None], 0.0, -3.0)
        return self.fc(x) + mask


def test_equal_tables_are_stored_once(tmp_path: Path) -> None:
    module = nn.Sequential(Layer(32), Layer(32), Layer(32)).eval()
    x = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0))
    candidate = Candidate(capture(module, (x,)), (TensorSpec("x", (1, 32, 32), "float32"),), original=module)
    path = tmp_path / "m.onnx"
    OnnxExporter("onnx-fp32").export(candidate, Data(), path)
    graph = onnx.load(str(path)).graph
    shapes = [tuple(i.dims) for i in graph.initializer if i.dims == [32, 32]]
    assert len(shapes) == 4, "one mask, and the three weights although they are equal"
    found = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(found, module(x).detach().numpy(), atol=1e-5)
