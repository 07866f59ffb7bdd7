"""Which architectures can be pruned and exported: 30 of timm's, random weights, three targets.

    python benchmarks/coverage.py [--only NAME ...] [--sparsity 0.3] [--json PATH]

Each net loses 30 % of every group's channels and is exported to TFLite INT8, ONNX QDQ and Core ML 4-bit, all
rounded to the nearest value: what is counted is which nets pass, and finer ways take minutes for each.
Pruning passes when the smaller net has finite outputs of the old shapes and at most 90 % of the
multiply-accumulates. A target passes when its file opens and gives finite outputs of the right shapes; the
cosine with the pruned float net on the same input is printed beside it. Weights are random, so nothing is
said about accuracy. The nets were chosen for the difference of their parts, before any was tried.

Needs timm 1.0.31 without its dependencies (`pip install --no-deps timm==1.0.31`), and huggingface_hub,
safetensors. The exit code is 1 when fewer than 27 nets pass pruning.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import json
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgecomp import pipeline_export as exporting
from edgecomp import registry
from edgecomp.compress.macs import count_macs
from edgecomp.compress.prune import PruneChannels
from edgecomp.compress.ptq import Quantize
from edgecomp.door import run_float
from edgecomp.errors import EdgecompError
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec

TARGETS: dict[str, dict[str, Any]] = {
    "tflite-int8": {}, "onnx-qdq": {}, "coreml-pal4": {"assignment": "nearest"},
}  # fmt: skip
NEEDED = 27
# Name -> side of the input, and what the constructor is given to make the run quick.
NETS: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, {}),
    "resnetv2_18": (64, {}),
    "resnext26ts": (64, {}),
    "seresnext26ts": (64, {}),
    "skresnet18": (64, {}),
    "dla46_c": (64, {}),
    "densenet121": (64, {}),
    "regnety_002": (64, {}),
    "mobilenetv2_050": (96, {}),
    "mobilenetv3_small_050": (96, {}),
    "mobilenetv4_conv_small_050": (96, {}),
    "efficientnet_b0": (96, {}),
    "ghostnet_050": (96, {}),
    "rexnet_100": (96, {}),
    "repvgg_a0": (64, {}),
    "hrnet_w18_small": (64, {}),
    "dpn48b": (64, {}),
    "convnext_atto": (96, {}),
    "convnextv2_atto": (96, {}),
    "poolformer_s12": (96, {}),
    "starnet_s1": (96, {}),
    "vit_tiny_patch16_224": (64, {"img_size": 64}),
    "swin_tiny_patch4_window7_224": (112, {"img_size": 112, "embed_dim": 48, "depths": (2, 2, 2, 2)}),
    "pit_ti_224": (224, {}),
    "levit_128s": (224, {}),
    "xcit_nano_12_p16_224": (96, {"img_size": 96}),
    "mobilevit_xxs": (128, {}),
    "edgenext_xx_small": (128, {}),
    "efficientformerv2_s0": (224, {}),
    "gmlp_ti16_224": (64, {"img_size": 64}),
}


class Pictures:
    """A data source of one array [N, 3, H, W]."""

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __init__(self, inputs: np.ndarray) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for at in range(0, len(self), size):
            yield Batch((self.inputs[at : at + size],))


class _Nothing(type):
    """Stands for any name of torchvision, which has no wheel for this torch; timm only imports them."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets `import torchvision.anything` pass; timm's models need nothing of it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = _placeholder  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def _placeholder(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Nothing(name, (), {})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(NETS), metavar="NAME")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        rows.append(covered(name, arguments.sparsity))
        print(told(rows[-1]), flush=True)
    passed = sum(r["pruned"] for r in rows)
    counts = {t: sum(r["targets"].get(t, {}).get("passed", False) for r in rows) for t in TARGETS}
    print(f"pruning: {passed} of {len(rows)}")
    for target, count in counts.items():
        print(f"{target}: {count} of {len(rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"nets": rows, "pruned": passed, **counts}, indent=2) + "\n")
    if len(rows) == len(NETS) and passed < NEEDED:
        raise SystemExit(1)


def covered(name: str, sparsity: float) -> dict[str, Any]:
    """One net: `pruned`, `macs` (fraction that remains), `reason`, and an entry for each target."""
    started = time.perf_counter()
    torch.manual_seed(0)
    row: dict[str, Any] = {"name": name, "pruned": False, "macs": None, "reason": "", "targets": {}}
    side, settings = NETS[name]
    module = built(name, settings)
    inputs = np.random.default_rng(0).standard_normal((4, 3, side, side)).astype(np.float32)
    start = Candidate(module, (TensorSpec("x", (1, 3, side, side), layout="NCHW"),))
    try:
        pruned = PruneChannels(sparsity=sparsity)(start, Data())
        row |= checked(start, pruned, torch.from_numpy(inputs[:1]))
        if row["pruned"]:
            row["kept"] = [n for n in pruned.history[-1].notes if "not pruned" in n]
            row["targets"] = {t: exported(t, pruned, inputs) for t in TARGETS}
    except Exception as error:  # a crash is a result here: it stands in the table with its text
        row["reason"] = told_error(error)
    return {**row, "seconds": time.perf_counter() - started}


def built(name: str, settings: dict[str, Any]) -> torch.nn.Module:
    if not any(isinstance(f, _Torchvision) for f in sys.meta_path):
        sys.meta_path.insert(0, _Torchvision())
    import timm

    module: torch.nn.Module = timm.create_model(name, pretrained=False, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)  # a head of zeros would say nothing of what comes before it
    return module.eval()


@torch.no_grad()
def checked(start: Candidate, pruned: Candidate, x: torch.Tensor) -> dict[str, Any]:
    before, after = start.module(x), pruned.module(x)
    macs = count_macs(pruned.module, (x,)) / count_macs(start.module, (x,))
    if after.shape != before.shape:
        return {"macs": macs, "reason": f"outputs have shape {tuple(after.shape)}, not {tuple(before.shape)}"}
    if not torch.isfinite(after).all():
        return {"macs": macs, "reason": "outputs are not finite"}
    return {"pruned": macs <= 0.9, "macs": macs, "reason": "" if macs <= 0.9 else "hardly anything is pruned"}


def exported(target: str, pruned: Candidate, inputs: np.ndarray) -> dict[str, Any]:
    """`passed`, `cosine` of the artifact's output with the pruned float net's, `reason`."""
    data = Data(calibration=Pictures(inputs))
    try:
        with tempfile.TemporaryDirectory() as folder:
            exporter = exporting.make_exporter(target, TARGETS[target])
            each = exporting.wanted(target, exporter, pruned)
            candidate = pruned
            if each.quantized:
                candidate = Quantize(samples=4, rounding="nearest")(pruned, data)
                exporting.check_quantized(each, candidate)
            path = exporting.path_for(Path(folder), target, exporter)
            exporter.export(candidate, data, path)
            found = ran(path, inputs[:1])
    except Exception as error:
        return {"passed": False, "cosine": None, "reason": told_error(error)}
    with torch.no_grad():
        expected = pruned.module(torch.from_numpy(inputs[:1])).numpy()
    if found.shape != expected.shape or not np.isfinite(found).all():
        return {"passed": False, "cosine": None, "reason": f"outputs {found.shape} are wrong or not finite"}
    return {"passed": True, "cosine": cosine(found, expected), "reason": ""}


def told_error(error: Exception) -> str:
    """Our errors say what to do; any other is a fault of ours, and its class is named."""
    text = " ".join(str(error).split())
    return text if isinstance(error, EdgecompError) else f"{type(error).__name__}: {text}"


def ran(path: Path, inputs: np.ndarray) -> np.ndarray:
    """The first output of an artifact, real values in PyTorch's layout."""
    session = registry.load("runtimes", registry.format_of(path.suffix))().open(path)
    return run_float(session, [inputs])[0]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-30))


def told(row: dict[str, Any]) -> str:
    cells = [
        f"{t} {e['cosine']:.3f}" if e["passed"] else f"{t} FAILED ({e['reason'][:160]})"
        for t, e in row["targets"].items()
    ]
    head = f"{row['name']}: {'pruned' if row['pruned'] else 'NOT PRUNED ' + row['reason'][:160]}"
    if row["macs"] is not None:
        head += f", {row['macs']:.2f} of MACs"
    return ", ".join([head, *cells, f"{row['seconds']:.0f} s"])


if __name__ == "__main__":
    main()
