"""The Core ML exporter: what it writes, what it refuses, and that it writes the same bytes every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp import graph, manifest
from edgecomp.errors import ModelError, OutputError, UnsupportedOpError
from edgecomp.exporters.coreml import CoreMLExporter
from edgecomp.exporters.coreml_toolkit import ct, quiet
from edgecomp.runtimes.coreml import CoreMLRuntime, ReferenceSession
from edgecomp.spec import (
    Artifact,
    Candidate,
    Data,
    QuantizationPlan,
    QuantSpec,
    TensorQuantization,
    TensorSpec,
)

TARGETS = ("pal4", "pal6", "int8", "int4", "fp16", "fp32")


class Net(nn.Module):
    """Convolutions (plain, depthwise, pointwise, transposed), batch norm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.up = nn.ConvTranspose2d(24, 16, 2, 2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(torch.relu(self.depthwise(self.stem(x))))
        return self.head(self.up(x).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    module = Net().eval()
    module.stem[1].running_var.uniform_(0.5, 2)
    return module


def candidate(module: nn.Module, *shape: int, name: str = "image", dtype: str = "float32") -> Candidate:
    return Candidate(module, (TensorSpec(name, shape, dtype),))


X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def export(exporter: CoreMLExporter, given: Candidate, folder: Path) -> Artifact:
    return exporter.export(given, Data(), folder / f"{exporter.target}.mlpackage")


def opened(artifact: Artifact) -> ReferenceSession:
    session = CoreMLRuntime().open(artifact.path)
    assert isinstance(session, ReferenceSession)
    return session


def sqnr_db(reference: np.ndarray, found: np.ndarray) -> float:
    noise = np.square(reference.astype(np.float64) - found).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / max(noise, 1e-30)))


@pytest.mark.parametrize(
    ("target", "least_db"),
    [("fp32", 100), ("fp16", 50), ("int8", 35), ("pal6", 30), ("pal4", 15), ("int4", 10)],
)
@pytest.mark.parametrize("canonical", [False, True])
def test_targets(target: str, least_db: float, canonical: bool, tmp_path: Path) -> None:
    module = net()
    given = candidate(graph.capture(module, (X,)) if canonical else module, 1, 3, 16, 16)
    exporter = CoreMLExporter(f"coreml-{target}")
    assert exporter.problems(given) == []
    artifact = export(exporter, given, tmp_path)
    session = opened(artifact)
    assert [t.name for t in session.inputs] == ["image"]
    assert session.outputs == artifact.outputs == (TensorSpec("output", (1, 10)),)
    found = session.run([X.numpy()])[0]
    assert sqnr_db(module(X).detach().numpy(), found) >= least_db


def test_the_artifact_describes_itself(tmp_path: Path) -> None:
    given = candidate(net(), 1, 3, 16, 16)
    artifact = export(CoreMLExporter(), given, tmp_path)
    manifest.write(artifact)
    assert manifest.read(artifact.path).sha256 == artifact.sha256
    facts = json.loads(opened(artifact).package.metadata[manifest.KEY])
    assert facts["target"] == "coreml-pal4" and facts["format"] == "coreml"
    assert facts["history"][-1]["settings"]["group_size"] == "auto"
    assert facts["versions"]["coremltools"] == ct.__version__
    assert facts["skipped"] == [vars(p) for p in artifact.skipped]
    assert not any("date" in key for key in opened(artifact).package.metadata)


def _program_of_coremltools(path: Path) -> Any:
    """The package as coremltools' own reader sees it; it checks the types of every operation."""
    from coremltools.converters.mil.frontend.milproto import load

    with quiet():
        model = ct.models.MLModel(str(path), skip_model_load=True)
        spec = model.get_spec()
        return load.load(spec, spec.specificationVersion, model.weights_dir)


@pytest.mark.parametrize("target", TARGETS)
def test_coremltools_reads_what_we_write(target: str, tmp_path: Path) -> None:
    artifact = export(CoreMLExporter(f"coreml-{target}"), candidate(net(), 1, 3, 16, 16), tmp_path)
    program = _program_of_coremltools(artifact.path)
    session = opened(artifact)
    compressed = [
        o for o in program.functions["main"].operations if o.op_type.startswith("constexpr_")
    ]  # fmt: skip
    assert bool(compressed) == (target not in ("fp16", "fp32"))
    for operation in compressed:
        theirs = operation.materialized_val_inference()
        assert np.array_equal(session.weight(operation.outputs[0].name), theirs.astype(np.float32))


def test_weights_are_palette_entries(tmp_path: Path) -> None:
    """Every group of four channels holds at most 16 values, and each weight went to the nearest."""
    module = net()
    artifact = export(
        CoreMLExporter(group_size=4, depthwise="palette", min_elements=1),
        candidate(module, 1, 3, 16, 16),
        tmp_path,
    )
    session = opened(artifact)
    packed = [p.name for p in session.placement() if p.type == "constexpr_lut_to_dense"]
    assert len(packed) == 5
    pointwise = next(n for n in packed if "pointwise" in n)
    weight = next(o.outputs[0][0] for o in session.package.main.operations if o.name == pointwise)
    decoded, original = session.weight(weight), module.pointwise.weight.detach().half().float().numpy()
    for group in range(6):
        rows = slice(4 * group, 4 * group + 4)
        entries = np.unique(decoded[rows])
        assert entries.size <= 16
        nearest = np.abs(original[rows, ..., None] - entries).min(-1)
        np.testing.assert_array_equal(np.abs(original[rows] - decoded[rows]), nearest)


def test_palettes_of_int8_halve_their_bytes(tmp_path: Path) -> None:
    module = nn.Linear(256, 64).eval()
    given, decoded, sizes = candidate(module, 1, 256), {}, {}
    for dtype in ("float16", "int8"):
        (tmp_path / dtype).mkdir()
        artifact = export(CoreMLExporter(palette_dtype=dtype), given, tmp_path / dtype)  # type: ignore[arg-type]
        session = opened(artifact)
        final = next(o for o in session.package.main.operations if o.type == "constexpr_lut_to_dense")
        decoded[dtype] = session.weight(final.outputs[0][0])
        weights = artifact.path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
        sizes[dtype] = weights.stat().st_size
        theirs = _program_of_coremltools(artifact.path).functions["main"].find_ops(op_type="linear")[0]
        assert theirs.weight.op.op_type == "constexpr_lut_to_dense"
    # 64 palettes of 16 entries: 2 bytes each, or 1 and a scale of 2 bytes per palette and its header.
    assert sizes["float16"] - sizes["int8"] == 64 * 16 - 64 * 2 - 64
    largest = np.abs(decoded["float16"]).max(1, keepdims=True)
    assert np.all(np.abs(decoded["float16"] - decoded["int8"]) <= largest * 0.0045)
    assert not np.array_equal(decoded["float16"], decoded["int8"])


def test_weights_on_a_palette_are_kept_as_they_are(tmp_path: Path) -> None:
    module = nn.Linear(64, 8).eval()
    grid = torch.linspace(-1, 1, 16).half().float()
    module.weight.data = grid[torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(0))]
    given = candidate(module, 1, 64)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(2)).numpy()
    half = opened(export(CoreMLExporter("coreml-fp16"), given, tmp_path)).run([x])[0]
    assert np.array_equal(opened(export(CoreMLExporter(), given, tmp_path)).run([x])[0], half)


def test_what_was_not_palettized_is_listed(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 30, 3), nn.Conv2d(30, 30, 3, groups=30), nn.Conv2d(30, 2, 1)).eval()
    artifact = export(CoreMLExporter(group_size=8), candidate(module, 1, 3, 9, 9), tmp_path)
    assert [vars(p) for p in artifact.skipped] == [
        {
            "op": "conv",
            "module": "2.weight",
            "reason": "60 weights; at least 256 are needed for a palette to pay",
        }
    ]
    stored = {p.dtype for p in opened(artifact).placement() if p.type.startswith("constexpr")}
    assert stored == {"uint4", "int8"}
    assert artifact.history[-1].notes == (
        "palettes: every weight counts alike: there is no calibration data",
        "0.weight: palettes of 6 output channels, not 8: 8 does not divide 30",
        "1.weight: depthwise: 8-bit integers per channel instead of a palette",
    )


class _Position(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 40, 32))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.position


def test_large_constants_that_are_no_weights_are_listed(tmp_path: Path) -> None:
    (problem,) = export(CoreMLExporter(), candidate(_Position(), 1, 40, 32), tmp_path).skipped
    assert (problem.op, problem.module) == ("add", "position")
    assert problem.reason == "1280 values that no layer has as its weight"


def test_a_palette_that_would_cost_more_than_it_saves_is_shared_wider(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(8, 64, 1), nn.Conv2d(64, 64, 3, groups=64)).eval()
    exporter = CoreMLExporter(group_size=1, depthwise="palette")
    assert export(exporter, candidate(module, 1, 8, 9, 9), tmp_path).history[-1].notes[1:] == (
        "0.weight: palettes of 8 output channels, not 1: smaller ones would not pay",
        "1.weight: palettes of 8 output channels, not 1: smaller ones would not pay",
    )


def test_a_decided_quantization_is_lowered_as_it_is(tmp_path: Path) -> None:
    """int8 takes the plan's integers and scales, though max|q| is 90 and a fresh fit would differ."""
    module = graph.capture(nn.Linear(32, 16).eval(), (torch.zeros(1, 32),))
    name = next(n for n, _ in module.named_parameters() if n.endswith("weight"))
    rng = np.random.default_rng(0)
    integers, scale = rng.integers(-90, 91, (16, 32)).astype(np.int8), rng.uniform(0.25, 0.5, 16)
    scale = scale.astype(np.float16).astype(np.float32)
    decided = TensorQuantization(
        QuantSpec(8, symmetric=True, axis=0, narrow=True), scale, np.zeros(16, np.int32), integers
    )
    given = replace(candidate(module, 1, 32), quantization=QuantizationPlan({}, {name: decided}))
    session = opened(export(CoreMLExporter("coreml-int8"), given, tmp_path))
    operation = next(o for o in session.package.main.operations if o.type.startswith("constexpr"))
    assert np.array_equal(operation.inputs["data"][0], integers)
    assert np.array_equal(np.asarray(operation.inputs["scale"][0], np.float32)[:, 0], scale)


@pytest.mark.parametrize("target", ["pal4", "int8"])
def test_packages_for_ios16(target: str, tmp_path: Path) -> None:
    module = net()
    exporter = CoreMLExporter(
        f"coreml-{target}", group_size=None, minimum_deployment_target="iOS16", min_elements=100
    )
    artifact = export(exporter, candidate(module, 1, 3, 16, 16), tmp_path)
    session = opened(artifact)
    assert {p.type for p in session.placement()} >= (
        {"constexpr_lut_to_dense", "constexpr_affine_dequantize"}
        if target == "pal4"
        else {"constexpr_affine_dequantize"}
    )
    _program_of_coremltools(artifact.path)
    assert sqnr_db(module(X).detach().numpy(), session.run([X.numpy()])[0]) >= 10


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        self.lstm, self.gru = nn.LSTM(32, 32, batch_first=True), nn.GRU(32, 32, batch_first=True)
        self.register_buffer("mask", torch.full((6, 6), float("-inf")).triu(1))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        x = self.lstm(x)[0] + self.gru(x)[0]
        weights = torch.softmax(x @ x.transpose(1, 2) / 6 + self.mask, -1)
        return weights @ x, ids * 2


def test_embeddings_recurrent_layers_masks_and_several_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Recurrent().eval()
    given = candidate(module, 1, 6, name="ids", dtype="int64")
    ids = torch.tensor([[1, 5, 90, 3, 3, 0]])
    artifact = export(CoreMLExporter(), given, tmp_path)
    session = opened(artifact)
    assert session.inputs[0].dtype == "int32"
    assert [(o.name, o.dtype) for o in session.outputs] == [("output_0", "float32"), ("output_1", "int32")]
    found, doubled = session.run([ids.int().numpy()])
    assert doubled.tolist() == [[2, 10, 180, 6, 6, 0]]
    assert sqnr_db(module(ids)[0].detach().numpy(), found) >= 12
    kinds = [p.type for p in session.placement()]
    assert kinds.count("constexpr_lut_to_dense") >= 4  # the embedding, the LSTM's two, the GRU's in its loop
    assert any(n.endswith("infinite values are stored as 30000") for n in artifact.history[-1].notes)
    _program_of_coremltools(artifact.path)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 4, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        self.cache.add_(x.half())
        return self.cache * 2.0


def test_states(tmp_path: Path) -> None:
    artifact = export(CoreMLExporter("coreml-fp16", states=("cache",)), candidate(Decoder(), 1, 4), tmp_path)
    session = opened(artifact)
    ones = np.ones((1, 4), np.float32)
    assert [session.run([ones])[0][0, 0] for _ in range(3)] == [2.0, 4.0, 6.0]


def test_what_cannot_be_traced_is_exported(tmp_path: Path) -> None:
    """In eval mode PyTorch runs this layer as one fused operation, which only `torch.export` takes apart."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 10)).eval()
    given, x = candidate(module, 1, 6, 32), torch.randn(1, 6, 32)
    assert CoreMLExporter().problems(given) == []
    with torch.no_grad():
        expected = module(x).numpy()
    exact = opened(export(CoreMLExporter("coreml-fp32"), given, tmp_path))
    assert sqnr_db(expected, exact.run([x.numpy()])[0]) >= 100
    artifact = export(CoreMLExporter(group_size=4), given, tmp_path)
    assert (
        "1.weight: palettes of 2 output channels, not 4: 4 does not divide 10" in artifact.history[-1].notes
    )
    assert sqnr_db(expected, opened(artifact).run([x.numpy()])[0]) >= 20


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Determinant())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


class Determinant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(x)


def test_operations_without_translation_are_named_first(tmp_path: Path) -> None:
    given = candidate(Unsupported(), 1, 4)
    problems = CoreMLExporter().problems(given)
    assert [
        (p.op.removeprefix("aten::").removesuffix(".default").removeprefix("aten."), p.module)
        for p in problems
    ] == [("special_i0", "inner.0")]
    with pytest.raises(UnsupportedOpError, match="special_i0.default in inner.0"):
        export(CoreMLExporter(), given, tmp_path)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    module = nn.Linear(4, 4)
    module.weight.data[1, 2] = float("nan")
    given = candidate(module, 1, 4)
    assert CoreMLExporter().problems(given)[0].module == "weight"
    with pytest.raises(ModelError, match="weight: 1 of 16 values are NaN or Inf"):
        export(CoreMLExporter(), given, tmp_path)


class _Dictionary(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x}


def test_other_returns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="returns dict; Core ML takes a tensor or a tuple"):
        export(CoreMLExporter(), candidate(_Dictionary(), 1, 4), tmp_path)


def test_the_module_is_not_changed_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module = nn.Linear(64, 8)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    export(CoreMLExporter(), candidate(module, 1, 64), tmp_path)
    assert module.training and all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["coreml-pal4.mlpackage"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        CoreMLExporter().export(candidate(nn.Linear(4, 4), 1, 4), Data(), tmp_path / "file" / "m.mlpackage")


_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_coreml_export import CoreMLExporter, Recurrent, candidate, export, net
import torch
for target in ("pal4", "int4"):
    exporter = CoreMLExporter("coreml-" + target)
    print(export(exporter, candidate(net(), 1, 3, 16, 16), Path(sys.argv[1])).sha256)
torch.manual_seed(0)
given = candidate(Recurrent().eval(), 1, 6, name="ids", dtype="int64")
print(export(CoreMLExporter(), given, Path(sys.argv[1])).sha256)
"""


@pytest.mark.slow
def test_same_bytes_in_two_processes(tmp_path: Path) -> None:
    script = _SCRIPT.format(folder=str(Path(__file__).parent))
    found = []
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(run.stdout)
    assert found[0] == found[1] and len(found[0].split()) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "coreml-pal5"}, "target is 'coreml-pal5'; expected one of coreml-pal4"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": "some"}, "group_size is 'some'; expected a number, auto, or none"),
        ({"importance": "guess"}, "importance is 'guess'"),
        ({"samples": 0}, "with 0 samples"),
        ({"block_size": 0}, "block_size is 0"),
        ({"minimum_deployment_target": "iOS14"}, "expected one of iOS16, iOS17, iOS18"),
        ({"minimum_deployment_target": "iOS17"}, "palettes of groups need iOS18"),
        (
            {"target": "coreml-int4", "minimum_deployment_target": "iOS17"},
            "coreml-int4 and palettes of int8 need",
        ),
        ({"compute_precision": "float64"}, "compute_precision is 'float64'"),
        ({"depthwise": "int3"}, "depthwise is 'int3'"),
        ({"palette_dtype": "int4"}, "palette_dtype is 'int4'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoreMLExporter(**settings)
