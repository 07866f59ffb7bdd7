"""Weights on palettes with the inputs in view, and bits under a size: what is stored, how good, the notes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_support import Rows, candidate_of, normal
from torch import Tensor, nn

from edgecomp import door
from edgecomp.errors import InputError
from edgecomp.exporters import coreml_budget, coreml_recover
from edgecomp.exporters.coreml import CoreMLExporter
from edgecomp.graph import capture, constants
from edgecomp.runtimes.coreml import CoreMLRuntime
from edgecomp.spec import Artifact, Data


class Net(nn.Module):
    """Convolutions with batch normalization (folded), a depthwise one, a small and a large linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.depth, self.wide = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 40, 1)
        self.hidden, self.head = nn.Linear(40, 64), nn.Linear(64, 3)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 2)
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.wide(torch.relu(self.depth(x)))).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))


PICTURES = normal(32, 3, 16, 16).numpy()
DATA = Data(calibration=Rows((PICTURES[:16],)))


def export(folder: Path, data: Data = DATA, module: nn.Module | None = None, **settings: object) -> Artifact:
    candidate = candidate_of(module or Net(), torch.from_numpy(PICTURES[:1]))
    out = folder / f"{len(list(folder.iterdir()))}.mlpackage"
    return CoreMLExporter(**settings).export(candidate, data, out)  # type: ignore[arg-type]


def noise_db(artifact: Artifact) -> float:
    """On the 16 pictures that calibration did not see."""
    with torch.no_grad():
        real = Net().eval()(torch.from_numpy(PICTURES[16:])).numpy()
    found = door.run_float(CoreMLRuntime().open(artifact.path), [PICTURES[16:]])[0]
    return float(10 * np.log10((real**2).sum() / ((found - real) ** 2).sum()))


def test_assigned_palettes_are_nearer_to_the_float_model_at_the_same_size(tmp_path: Path) -> None:
    plain = export(tmp_path, assignment="nearest", min_elements=64)
    assigned = export(tmp_path, min_elements=64)
    assert noise_db(assigned) > noise_db(plain) + 2
    assert abs(assigned.size_bytes - plain.size_bytes) < 0.1 * plain.size_bytes
    notes = assigned.history[-1].notes
    assert "palettes: weights assigned by GPTQ on 16 samples" in notes
    assert any(n.startswith("depth") and "8-bit integers per channel" in n for n in notes)


def test_stored_weights_are_the_assigned_ones(tmp_path: Path) -> None:
    """The palettizer finds the assigned values again, to float16: file and recovered graph agree."""
    module = Net().eval()
    graph = capture(module, (torch.from_numpy(PICTURES[:1]),))
    samples = [(torch.from_numpy(p[None]),) for p in PICTURES[:16]]
    bits = {n.name: 4 for n in coreml_recover.layers(graph, 200)}
    stored = coreml_recover.recover(graph, samples, bits, lambda b, c, n: 8)
    assert set(stored.values()) == {4} and len(stored) == 3
    for node in graph.graph.find_nodes(op="get_attr"):
        if str(node.target) in stored:
            rows = constants.value_of(graph, node).reshape(-1, 8 * node.meta["val"][0].numel())
            assert all(len(set(r.tolist())) <= 16 for r in rows)
    artifact = export(
        tmp_path, group_size=8, min_elements=200, depthwise="float", compute_precision="float32"
    )
    with torch.no_grad():
        wanted = graph(torch.from_numpy(PICTURES[16:17])).numpy()
    found = door.run_float(CoreMLRuntime().open(artifact.path), [PICTURES[16:17]])[0]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_depthwise_weights_are_rounded_in_their_turn_and_stored_as_they_were_rounded(tmp_path: Path) -> None:
    """What the package computes is the recovered graph, int8 steps of depthwise convolutions included."""
    graph = capture(Net().eval(), (torch.from_numpy(PICTURES[:1]),))
    samples = [(torch.from_numpy(p[None]),) for p in PICTURES[:16]]
    (depthwise,) = coreml_recover.depthwise_layers(graph, 100)
    bits = {n.name: 4 for n in coreml_recover.layers(graph, 100)} | {depthwise.name: 8}
    coreml_recover.recover(graph, samples, bits, lambda b, c, n: 8)
    weight = constants.value_of(graph, depthwise.args[1]).numpy().reshape(16, 9)
    steps = weight / (np.abs(weight).max(1, keepdims=True) / 127)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
    artifact = export(tmp_path, group_size=8, min_elements=100, compute_precision="float32")
    with torch.no_grad():
        wanted = graph(torch.from_numpy(PICTURES[16:17])).numpy()
    found = door.run_float(CoreMLRuntime().open(artifact.path), [PICTURES[16:17]])[0]
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_a_size_is_kept_and_used(tmp_path: Path) -> None:
    least = export(tmp_path, min_elements=64)
    artifact = export(tmp_path, min_elements=64, size=least.size_bytes + 2500)
    assert least.size_bytes < artifact.size_bytes <= least.size_bytes + 2500
    assert any(n.endswith("bits, within the size") for n in artifact.history[-1].notes)
    assert noise_db(artifact) > noise_db(least) + 1
    with pytest.raises(InputError, match=r"size is 1000 bytes, and the package takes \d+ with 4 bits"):
        export(tmp_path, size=1000)


class Normal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def test_composite_operations_stay_whole(tmp_path: Path) -> None:
    artifact = export(tmp_path, module=Normal())
    assert "palettes: every weight took its nearest entry: it would take group_norm apart" in (
        artifact.history[-1].notes
    )
    with pytest.raises(InputError, match="with the inputs in view: it would take group_norm apart"):
        export(tmp_path, module=Normal(), assignment="gptq")
    with pytest.raises(InputError, match="there is no calibration data"):
        export(tmp_path, Data(), assignment="gptq")


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="assignment is 'best'"):
        CoreMLExporter(assignment="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size is set; it needs coreml-pal4"):
        CoreMLExporter("coreml-int8", size="3MB")
    with pytest.raises(InputError, match="size is '3 pounds'"):
        CoreMLExporter(size="3 pounds")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3.2MB", 3_200_000), ("3.2 mb", 3_200_000), (900, 900), ("2KiB", 2048), ("5kB", 5000)],
)
def test_sizes_are_read(text: str | int, expected: int) -> None:
    assert coreml_budget.parse(text) == expected


def test_bits_go_where_they_remove_the_most_error_per_byte() -> None:
    sizes = {4: 100, 6: 150, 8: 200}
    layers = [coreml_budget.Layer(n, e, sizes) for n, e in (("a", 1.0), ("b", 10.0), ("c", 0.1))]
    assert coreml_budget.choose(layers, 0) == {"a": 4, "b": 4, "c": 4}
    assert coreml_budget.choose(layers, 50) == {"a": 4, "b": 6, "c": 4}
    assert coreml_budget.choose(layers, 100) == {"a": 6, "b": 6, "c": 4}
    assert coreml_budget.choose(layers, 150) == {"a": 6, "b": 8, "c": 4}
    assert coreml_budget.choose(layers, 1000) == {"a": 8, "b": 8, "c": 8}


def test_a_step_that_does_not_fit_is_passed_over() -> None:
    large = coreml_budget.Layer("large", 1e6, {4: 1000, 6: 1500, 8: 2000})
    small = coreml_budget.Layer("small", 1.0, {4: 10, 6: 15, 8: 20})
    assert coreml_budget.choose([large, small], 6) == {"large": 4, "small": 6}
