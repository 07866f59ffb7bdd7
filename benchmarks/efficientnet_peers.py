"""Other quantizers on EfficientNet-Lite0, as contenders of efficientnet_int8.py.

AIMET, NNCF and MCT each have an environment of their own, a Python that the script's options name:

    python -m venv aimet && aimet/bin/pip install aimet-onnx
    python -m venv nncf && nncf/bin/pip install nncf onnx onnxruntime
    python -m venv mct && mct/bin/pip install torch==2.13.0
    mct/bin/pip install model-compression-toolkit==2.6.1 onnx && mct/bin/pip install --no-deps torchvision
"""

from __future__ import annotations

import copy
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.fx.experimental import optimization

Work = Callable[[nn.Module, np.ndarray, Path], None]
SHAPE = (1, 3, 224, 224)
SIMULATED = ".pt"
ENVIRONMENTS = {"aimet": "aimet-onnx", "nncf": "nncf and onnx", "mct": "model-compression-toolkit"}


def remember(pythons: Mapping[str, str | None]) -> set[str]:
    """Leave what the options named to the contenders' processes; returns the peers that were not named."""
    for peer, python in pythons.items():
        if python:
            os.environ[_variable(peer)] = python
    return {peer for peer in pythons if _variable(peer) not in os.environ}


def _variable(peer: str) -> str:
    return f"EDGECOMP_BENCHMARK_{peer.upper()}"


def _python(peer: str) -> str:
    python = os.environ.get(_variable(peer), "")
    if not python:
        raise SystemExit(f"this contender needs --{peer} PYTHON, of an environment with {ENVIRONMENTS[peer]}")
    return python


def _elsewhere(peer: str, *arguments: str | Path) -> None:
    script = str(Path(__file__).with_name(f"zoo_{peer}.py"))
    done = subprocess.run(
        [_python(peer), script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-8:])
        raise SystemExit(f"{script} failed with exit code {done.returncode}:\n{tail}")


def float_onnx(model: nn.Module, folder: Path) -> Path:
    program = torch.onnx.export(
        model, (torch.zeros(SHAPE),), dynamo=True, input_names=["image"],
        output_names=["output"], opset_version=20, external_data=False, verbose=False,
    )  # fmt: skip
    program.save(str(folder / "float.onnx"))
    return folder / "float.onnx"


def prepared_onnx(model: nn.Module, folder: Path) -> Path:
    """The float model as a file, after ONNX Runtime's pre-processing for quantization."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source = float_onnx(model, folder)
    quant_pre_process(str(source), str(folder / "prepared.onnx"), skip_symbolic_shape=False)
    return folder / "prepared.onnx"


def aimet(scheme: str) -> Callable[[], Work]:
    """AIMET-ONNX on the prepared file (zoo_aimet.py)."""
    return _of_onnx("aimet", prepared_onnx, scheme)


def nncf(way: str) -> Callable[[], Work]:
    """NNCF on the float file (zoo_nncf.py)."""
    return _of_onnx("nncf", float_onnx, way)


def _of_onnx(peer: str, source: Callable[[nn.Module, Path], Path], way: str) -> Callable[[], Work]:
    def prepare() -> Work:
        _python(peer)

        def work(model: nn.Module, calibration: np.ndarray, path: Path) -> None:
            with tempfile.TemporaryDirectory() as folder:
                file, arrays = source(model, Path(folder)), Path(folder) / "calibration.npz"
                np.savez(arrays, image=calibration)
                _elsewhere(peer, file, arrays, path, way)

        return work

    return prepare


def mct() -> Work:
    """Sony's MCT on the traced model (zoo_mct.py): a torch module that simulates integers."""
    _python("mct")

    def work(model: nn.Module, calibration: np.ndarray, path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            graph, arrays = Path(folder) / "graph.pt", Path(folder) / "calibration.npz"
            torch.save(_plain(model), graph)
            np.savez(arrays, image=calibration)
            _elsewhere("mct", "quantize", graph, arrays, path)

    return work


def _plain(model: nn.Module) -> nn.Module:
    """The same function in the form that peers match: stock convolutions (the package has its own class),
    batch normalization folded, and a ReLU6 for each place where the package calls one module again."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, nn.Conv2d):
                setattr(parent, name, _stock(conv))
    folded = optimization.fuse(model.eval())
    for node in folded.graph.nodes:
        node.meta.clear()  # it tells torch.export of the modules that were called again
        if node.op == "call_module" and isinstance(folded.get_submodule(node.target), nn.ReLU6):
            node.target = f"{node.name}_alone"
            folded.add_submodule(node.target, nn.ReLU6())
    folded.recompile()
    return folded.eval()


def _stock(conv: nn.Conv2d) -> nn.Module:
    left, right, top, bottom = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    even = (left, top) == (right, bottom)
    stock = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, tuple(conv.stride),
        (top, left) if even else 0, conv.dilation, conv.groups, conv.bias is not None,
    )  # fmt: skip
    stock.load_state_dict(conv.state_dict())
    return stock if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), stock)


def simulated(module: Path, images: Path) -> np.ndarray:
    """Scores of a simulated module, run by its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.npy"
        _elsewhere("mct", "run", module, images, scores)
        return np.load(scores)


def torchao_x86() -> Work:
    """torchao's PT2E with its quantizer for x86, on stock modules; exported to ONNX by torch."""
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    def work(model: nn.Module, calibration: np.ndarray, path: Path) -> None:
        rows = torch.from_numpy(calibration)
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        program = torch.export.export(_plain(model), (rows[:1],))
        prepared = quantize_pt2e.prepare_pt2e(program.module(), quantizer)
        with torch.no_grad():
            for index in range(len(rows)):
                prepared(rows[index : index + 1])
        converted = quantize_pt2e.convert_pt2e(prepared)
        written = torch.onnx.export(
            converted, (rows[:1],), dynamo=True, input_names=["image"], output_names=["output"],
            opset_version=20, external_data=False, verbose=False,
        )  # fmt: skip
        written.save(str(path))

    return work


def onnxruntime_static() -> Work:
    """ONNX Runtime's own, after its pre-processing: U8S8, weights per channel, min-max."""
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        def __init__(self, crops: np.ndarray) -> None:
            self.rows = iter([{"image": crops[i : i + 1]} for i in range(len(crops))])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    def work(model: nn.Module, calibration: np.ndarray, path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            prepared = prepared_onnx(model, Path(folder))
            q.quantize_static(
                str(prepared), str(path), Reader(calibration),
                quant_format=q.QuantFormat.QDQ, per_channel=True,
                activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
                calibrate_method=q.CalibrationMethod.MinMax,
            )  # fmt: skip

    return work


def coremltools_palettes() -> Work:
    """coremltools' own: traced, converted to float16, 4-bit k-means, one palette for each weight tensor."""
    import edgecomp.exporters.coreml_toolkit  # noqa: F401  coremltools 9.0 fails on NumPy 2.4 without its repair

    import coremltools as ct  # isort: skip
    import coremltools.optimize.coreml as cto  # isort: skip

    def work(model: nn.Module, calibration: np.ndarray, path: Path) -> None:
        traced = torch.jit.trace(model, torch.zeros(SHAPE))
        converted = ct.convert(
            traced, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS16,
            inputs=[ct.TensorType("image", SHAPE)], outputs=[ct.TensorType("output")],
            compute_units=ct.ComputeUnit.CPU_ONLY, skip_model_load=True,
        )  # fmt: skip
        settings = cto.OpPalettizerConfig(mode="kmeans", nbits=4)
        compressed = cto.palettize_weights(converted, cto.OptimizationConfig(global_config=settings))
        compressed.save(str(path))

    return work
