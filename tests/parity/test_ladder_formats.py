"""The ladder on ONNX and Core ML exports: sound ones pass, faults planted before the export are named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import planted_faults
import pytest
import torch
from torch import nn

from edgecomp import ladder, manifest, registry
from edgecomp.calibration_data.sample import fashion_test
from edgecomp.compress.ptq import Quantize
from edgecomp.spec import Candidate, Data

SUFFIX = {"onnx-qdq": "net.onnx", "coreml-pal4": "net.mlpackage", "coreml-fp16": "net.mlpackage"}
LAYER = "net.blocks.3.layers.6"


def stale(layer: nn.Conv2d) -> None:
    """Weights of an earlier checkpoint."""
    noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    layer.weight.data += 0.5 * layer.weight.std() * noise


def swapped(layer: nn.Conv2d) -> None:
    """Output channels in reverse order."""
    layer.weight.data = layer.weight.data.flip(0)


FAULTS: dict[str, Callable[[nn.Conv2d], None]] = {"stale": stale, "swapped": swapped}


def export(candidate: Candidate, target: str, folder: Path) -> Path:
    path = folder / SUFFIX[target]
    settings = {"importance": "none"} if target == "coreml-pal4" else {}
    exporter = registry.load("exporters", target)(target=target, **settings)
    manifest.write(exporter.export(candidate, Data(calibration=planted_faults.DATA.calibration), path))
    return path


def climbed(candidate: Candidate, path: Path) -> Any:
    return ladder.climb(candidate, path, fashion_test(), limit=32, layer_samples=4)


def start(target: str) -> Candidate:
    return planted_faults.quantized() if target == "onnx-qdq" else planted_faults.floating()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["coreml-pal4", "coreml-fp16"])
def test_a_sound_package_is_not_blamed_and_shows_its_layers(target: str, tmp_path: Path) -> None:
    report = climbed(start(target), export(start(target), target, tmp_path))
    assert report["blamed"] is None
    seen = [r for r in report["layers"] if r["local_db"] is not None]
    assert {r["module"] for r in seen} >= {"net.stem.0", LAYER}
    assert all(r["local_db"] > (12 if target == "coreml-pal4" else 50) for r in seen)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx-qdq", "coreml-pal4"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_layer_of_the_export_is_named(fault: str, target: str, tmp_path: Path) -> None:
    wrong = copy.deepcopy(planted_faults.floating().module)
    FAULTS[fault](wrong.get_submodule(LAYER))
    changed = replace(planted_faults.floating(), module=wrong, original=wrong)
    if target == "onnx-qdq":
        changed = Quantize(samples=64)(changed, planted_faults.DATA)
        sound = planted_faults.quantized()
        # The plan's scales of all layers are the sound one's; the integers of one layer are not.
        weights = dict(sound.quantization.weights)
        name = str(planted_faults.weighted(sound.module, LAYER).args[1].target)
        weights[name] = changed.quantization.weights[name]
        changed = replace(sound, quantization=replace(sound.quantization, weights=weights))
    blamed = climbed(start(target), export(changed, target, tmp_path))["blamed"]
    assert blamed is not None and blamed["rung"] == "exported", blamed
    assert blamed["module"] == LAYER, blamed
