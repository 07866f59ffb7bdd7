"""`safe_x86`: no pair of products leaves int16, other channels keep their integers, outputs stay right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx_support import Rows, normal, quantized
from torch import Tensor, nn

from edgecomp import door, manifest
from edgecomp.errors import DataError, InputError
from edgecomp.exporters import onnx_safe_x86
from edgecomp.exporters.onnx import OnnxExporter, captured
from edgecomp.graph import fake_quant
from edgecomp.runtimes.onnxruntime import OnnxRuntime
from edgecomp.spec import Candidate, Data


class Net(nn.Module):
    """A stem of three channels (an odd number), groups, a depthwise layer, a linear head without bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.wide = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 1)
        self.depth, self.two = nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 6, 3, groups=2)
        self.head = nn.Linear(6, 5, bias=False)
        with torch.no_grad():
            self.wide.weight[3] *= 0.1
            self.wide.weight[3, 0] = 1.0  # one large weight: its pairs are safe

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.two(self.depth(x))).mean((2, 3)))


PICTURES = normal(24, 3, 20, 20).numpy()


@pytest.fixture(scope="module")
def net() -> Candidate:
    return quantized(Net(), PICTURES)


def stored(path: Path) -> dict[str, np.ndarray]:
    """Integer weights of the file by the module's name."""
    found = {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    return {n.removesuffix("_quantized"): v for n, v in found.items() if n.endswith("weight_quantized")}


def overflows(weight: np.ndarray) -> np.ndarray:
    """Output channels with two neighbours, in the order of the kernels, that 255 takes out of int16.

    Kernel positions outermost, input channels in pairs, all neighbours where their number is odd.
    """
    found = []
    for row in weight.astype(int):
        taps = [row[:, *where] for where in np.ndindex(*row.shape[1:])] if row.ndim > 1 else [row]
        line = np.concatenate(taps)
        step = 2 if len(row) % 2 == 0 else 1
        pairs = [(line[i], line[i + 1]) for i in range(0, len(line) - 1, step)]
        ends = [(a * u + b * v) for u, v in pairs for a in (0, 255) for b in (0, 255)]
        found.append(max(ends) > 32767 or min(ends) < -32768)
    return np.array(found)


def test_only_channels_at_risk_are_rounded_again(net: Candidate, tmp_path: Path) -> None:
    data = Data(calibration=Rows((PICTURES,)))
    OnnxExporter().export(net, data, tmp_path / "plain.onnx")
    artifact = OnnxExporter(safe_x86=True).export(net, data, tmp_path / "safe.onnx")
    plain, safe = stored(tmp_path / "plain.onnx"), stored(tmp_path / "safe.onnx")
    assert overflows(plain["stem.weight"]).any() and overflows(plain["two.weight"]).any()
    for name in plain:
        if name == "depth.weight":
            np.testing.assert_array_equal(safe[name], plain[name])
            continue
        assert not overflows(safe[name]).any(), name
        kept = ~overflows(plain[name])
        np.testing.assert_array_equal(safe[name][kept], plain[name][kept])
    assert not overflows(plain["wide.weight"])[3]
    notes = next(r.notes for r in artifact.history if r.name == "safe-x86")
    count = int(overflows(plain["stem.weight"]).sum())
    assert notes[0].startswith(f"stem: {count} of 8 output channels on scales up to ")
    assert manifest.embedded(artifact).count("safe-x86") == 1


def test_outputs_stay_as_near_to_the_float_model(net: Candidate, tmp_path: Path) -> None:
    data = Data(calibration=Rows((PICTURES,)))
    real = net.original(torch.from_numpy(PICTURES)).detach().numpy()
    noise = []
    for safe in (False, True):
        path = tmp_path / f"{safe}.onnx"
        OnnxExporter(safe_x86=safe).export(net, data, path)
        found = door.run_float(OnnxRuntime().open(path, optimize=False), [PICTURES])[0]
        noise.append(10 * np.log10((real**2).sum() / ((found - real) ** 2).sum()))
    assert noise[1] > noise[0] - 3.0 and noise[1] > 20


def test_biases_keep_the_mean_of_every_layer(net: Candidate) -> None:
    """Over the calibration pictures, before the next rounding; the head has no bias to move."""
    plan = net.quantization
    graph_module = captured(net)
    mended = onnx_safe_x86.mend(graph_module, plan, Rows((PICTURES,)))
    means = []
    for module, decided in ((graph_module, plan), (mended.graph_module, mended.plan)):
        stem = module.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)[0]
        rounded = fake_quant.fake_quantize(module, decided)
        found: list[np.ndarray] = []
        onnx_safe_x86.watch(
            rounded, (torch.from_numpy(PICTURES[:1]),), lambda n, v, f=found: f.append(v.numpy()),
            frozenset([stem.name]),
        )  # fmt: skip
        means.append(found[0].mean((0, 2, 3)))
    assert np.abs(means[0] - means[1]).max() < 0.01 * np.abs(means[0]).max()
    before = {n.name: n for n in graph_module.graph.nodes}
    assert all(n.name in before or "safe_bias" in n.name for n in mended.graph_module.graph.nodes)


def test_it_needs_data_and_the_right_target(net: Candidate, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give --calib SRC"):
        OnnxExporter(safe_x86=True).export(net, Data(), tmp_path / "m.onnx")
    with pytest.raises(InputError, match="safe_x86 is a setting of onnx-qdq, not of onnx-fp32"):
        OnnxExporter("onnx-fp32", safe_x86=True)
    assert not (tmp_path / "m.onnx").exists()
