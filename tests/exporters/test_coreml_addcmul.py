"""addcmul, which coremltools has no translation for: ours against torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgecomp.exporters.coreml import CoreMLExporter
from edgecomp.runtimes.coreml import CoreMLRuntime
from edgecomp.spec import Candidate, Data, TensorSpec


class Added(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.weight = nn.Parameter(torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.weight, x, x + 1, value=self.value)


@pytest.mark.parametrize("value", [1.0, 0.25])
def test_addcmul_is_what_torch_computes(value: float, tmp_path: Path) -> None:
    module = Added(value).eval()
    given = Candidate(module, (TensorSpec("x", (1, 4, 3, 3)),))
    exporter = CoreMLExporter(target="coreml-fp16")
    assert exporter.problems(given) == []
    artifact = exporter.export(given, Data(), tmp_path / "a.mlpackage")
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    (found,) = CoreMLRuntime().open(artifact.path).run([x.numpy()])
    torch.testing.assert_close(torch.from_numpy(found).float(), module(x).detach(), atol=0.02, rtol=0.01)
