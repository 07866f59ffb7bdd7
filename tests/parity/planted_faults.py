"""Twelve faults, planted in real exports: in the candidate before its export, or in the file after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import flatbuffers
import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema

from edgecomp import manifest
from edgecomp.calibration_data.sample import LABELS, fashion_calibration
from edgecomp.compress.ptq import Quantize
from edgecomp.demo.model import build
from edgecomp.exporters.tflite import TFLiteExporter
from edgecomp.graph import capture, constants
from edgecomp.spec import Candidate, Data, TensorQuantization, TensorSpec

DATA = Data(calibration=fashion_calibration())


class Classifier(torch.nn.Module):
    """The demo's trained model, with a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).softmax(1)


@cache
def floating() -> Candidate:
    model = Classifier().eval()
    with torch.no_grad():  # depthwise channels of unlike range, as trained networks of full size have
        norm = model.net.blocks[1].layers[4]
        norm.weight[::2] *= 0.05
        norm.bias[::2] *= 0.05
    return Candidate(model, (TensorSpec("x", (1, 1, 28, 28), layout="NCHW"),), original=model)


@cache
def quantized() -> Candidate:
    return Quantize(samples=64)(floating(), DATA)


def export(candidate: Candidate, folder: Path, target: str = "tflite-int8") -> Path:
    path = folder / "net.tflite"
    manifest.write(TFLiteExporter(target).export(candidate, DATA, path))
    return path


# Editing the file


def edit(path: Path, change: Callable[[schema.ModelT], None]) -> None:
    """Read a TFLite file, change its objects, write it back, and let the manifest tell its new hash."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
    change(model)
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    described = manifest.read(path)
    path.write_bytes(bytes(builder.Output()))
    manifest.write(manifest.describe(described, path))


def op_of(model: schema.ModelT, module: str) -> schema.OperatorT:
    """The operation whose output carries the name of a torch module (or of a node)."""
    graph = model.subgraphs[0]
    for op in graph.operators:
        name = graph.tensors[op.outputs[0]].name.decode()
        if name.rpartition("/")[0] == module or name.rpartition("/")[2] == module:
            return op
    raise KeyError(module)


def constant(model: schema.ModelT, tensor: int, dtype: type) -> np.ndarray:
    """A writable copy of a constant's values."""
    buffer = model.buffers[model.subgraphs[0].tensors[tensor].buffer]
    return np.frombuffer(bytes(buffer.data), dtype).copy()


def store(model: schema.ModelT, tensor: int, values: np.ndarray) -> None:
    """A buffer of its own, so that nobody else's constant is changed."""
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
    model.buffers.append(buffer)
    model.subgraphs[0].tensors[tensor].buffer = len(model.buffers) - 1


def scale_output(model: schema.ModelT, module: str, factor: float, shift: int = 0) -> None:
    tensor = model.subgraphs[0].tensors[op_of(model, module).outputs[0]]
    tensor.quantization.scale = np.float32(tensor.quantization.scale) * np.float32(factor)
    tensor.quantization.zeroPoint = np.asarray(tensor.quantization.zeroPoint) + shift


# The faults


def folded_wrongly(folder: Path) -> tuple[Candidate, Path]:
    """The fold uses an epsilon of 0.1 for one batch norm."""
    start = floating()
    graph = capture(start.module, (torch.zeros(1, 1, 28, 28),))
    norm = start.module.net.blocks[2].layers[4]
    node = weighted(graph, "net.blocks.2.layers.3")
    weight = constants.value_of(graph, node.args[1])
    ratio = torch.sqrt((norm.running_var + norm.eps) / (norm.running_var + 0.1))
    with torch.no_grad():
        weight.mul_(ratio[:, None, None, None])
    candidate = Quantize(samples=64)(replace(start, module=graph), DATA)
    return candidate, export(candidate, folder)


def weighted(graph: torch.fx.GraphModule, module: str) -> torch.fx.Node:
    """The convolution that came from a torch module."""
    found = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    return next(n for n in found if n.meta.get("module") == module)


def swapped_axes(folder: Path) -> tuple[Candidate, Path]:
    """The first convolution's kernel is stored with height and width exchanged."""
    candidate = quantized()
    path = export(candidate, folder)

    def change(model: schema.ModelT) -> None:
        op = op_of(model, "net.stem.2")
        shape = model.subgraphs[0].tensors[op.inputs[1]].shape
        weights = constant(model, op.inputs[1], np.int8).reshape(shape)
        store(model, op.inputs[1], weights.swapaxes(1, 2))

    edit(path, change)
    return candidate, path


def zero_point_off_by_one(folder: Path) -> tuple[Candidate, Path]:
    """The reshape's output says another zero point than its input."""
    candidate = quantized()
    path = export(candidate, folder)
    edit(path, lambda model: scale_output(model, "view", 1.0, 1))
    return candidate, path


def per_tensor_weights(folder: Path) -> tuple[Candidate, Path]:
    """One scale for all channels of a depthwise convolution."""
    candidate = quantized()
    node = weighted(candidate.module, "net.blocks.1.layers.3")
    name, plan = str(node.args[1].target), candidate.quantization
    fine = plan.weights[name]
    real = constants.value_of(candidate.module, node.args[1]).numpy()
    scale = np.full_like(fine.scale, fine.scale.max())
    values = np.clip(np.rint(real / scale.reshape(-1, 1, 1, 1)), -127, 127).astype(fine.values.dtype)
    coarse = TensorQuantization(fine.spec, scale, fine.zero_point, values)
    candidate = replace(candidate, quantization=replace(plan, weights={**plan.weights, name: coarse}))
    return candidate, export(candidate, folder)


def saturating_requantization(folder: Path) -> tuple[Candidate, Path]:
    """A convolution's results are brought to a scale four times too small."""
    candidate = quantized()
    path = export(candidate, folder)
    edit(path, lambda model: scale_output(model, "net.blocks.2.layers.6", 0.25))
    return candidate, path


def wrong_bias_scale(folder: Path) -> tuple[Candidate, Path]:
    """Bias integers are computed with half of the scale."""
    candidate = quantized()
    path = export(candidate, folder)

    def change(model: schema.ModelT) -> None:
        op = op_of(model, "net.blocks.0.layers.6")
        store(model, op.inputs[2], constant(model, op.inputs[2], np.int32) * 2)

    edit(path, change)
    return candidate, path


def missing_relu6(folder: Path) -> tuple[Candidate, Path]:
    """A fused activation is lost (in the float32 file; int8's own range would clip)."""
    candidate = floating()
    path = export(candidate, folder, "tflite-fp32")

    def change(model: schema.ModelT) -> None:
        op_of(model, "net.head.2").builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.RELU

    edit(path, change)
    return candidate, path


def wrong_padding(folder: Path) -> tuple[Candidate, Path]:
    """A convolution of stride 2 is padded behind only, as TensorFlow's SAME does."""
    candidate = quantized()
    path = export(candidate, folder)

    def change(model: schema.ModelT) -> None:
        graph = model.subgraphs[0]
        source = op_of(model, "net.blocks.0.layers.5").inputs[0]
        pad = next(op for op in graph.operators if op.outputs[0] == source)
        amounts = constant(model, pad.inputs[1], np.int32).reshape(-1, 2)
        moved = np.stack([np.zeros(len(amounts), np.int32), amounts.sum(axis=1)], axis=1).astype(np.int32)
        store(model, pad.inputs[1], moved)

    edit(path, change)
    return candidate, path


def shuffled_labels(folder: Path) -> tuple[Candidate, Path]:
    """The artifact names its classes in another order than the data."""
    candidate = quantized()
    path = export(candidate, folder)
    artifact = manifest.read(path)
    manifest.write(replace(artifact, labels=(*LABELS[1:], LABELS[0])))
    return candidate, path


def stale_weights(folder: Path) -> tuple[Candidate, Path]:
    """One layer keeps the weights of an earlier checkpoint."""
    candidate = quantized()
    path = export(candidate, folder)

    def change(model: schema.ModelT) -> None:
        op = op_of(model, "net.blocks.3.layers.6")
        weights = constant(model, op.inputs[1], np.int8).astype(np.int32)
        earlier = weights + np.random.default_rng(0).integers(-12, 13, weights.shape)
        store(model, op.inputs[1], np.clip(earlier, -127, 127).astype(np.int8))

    edit(path, change)
    return candidate, path


def layer_left_float(folder: Path) -> tuple[Candidate, Path]:
    """The exporter leaves one convolution float, the plan does not know."""
    plain = floating()
    partly = Quantize(samples=64, exclude=("net.blocks.3.layers.6",))(plain, DATA)
    return quantized(), export(partly, folder)


def wrong_softmax_scale(folder: Path) -> tuple[Candidate, Path]:
    """Softmax gives 1/128 a step, where TFLite's kernels compute 1/256."""
    candidate = quantized()
    path = export(candidate, folder)
    edit(path, lambda model: scale_output(model, "softmax", 2.0))
    return candidate, path


@dataclass(frozen=True)
class Fault:
    """`modules`: what may be named; empty where the fault lies in no layer."""

    plant: Callable[[Path], tuple[Candidate, Path]]
    rung: str
    modules: tuple[str, ...]


FAULTS = {
    "batch norm folded wrongly": Fault(folded_wrongly, "folded", ("net.blocks.2.layers.3",)),
    "swapped axes": Fault(swapped_axes, "exported", ("net.stem.0", "net.stem.2")),
    "zero point off by one": Fault(zero_point_off_by_one, "exported", ("net", "view")),
    "per-tensor for per-channel": Fault(per_tensor_weights, "fake-quantized", ("net.blocks.1.layers.3",)),
    "saturating requantization": Fault(saturating_requantization, "exported", ("net.blocks.2.layers.6",)),
    "wrong bias scale": Fault(wrong_bias_scale, "exported", ("net.blocks.0.layers.6",)),
    "missing ReLU6 clip": Fault(missing_relu6, "exported", ("net.head.0", "net.head.2")),
    "wrong padding": Fault(wrong_padding, "exported", ("net.blocks.0.layers.3", "net.blocks.0.layers.5")),
    "shuffled labels": Fault(shuffled_labels, "exported", ()),
    "stale weights": Fault(stale_weights, "exported", ("net.blocks.3.layers.6",)),
    "a layer left float": Fault(layer_left_float, "exported", ("net.blocks.3.layers.6",)),
    "wrong softmax scale": Fault(wrong_softmax_scale, "exported", ("softmax", "")),
}
