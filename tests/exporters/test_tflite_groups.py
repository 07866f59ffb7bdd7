"""tflite-int4 stores the integers that quantize-weights decided, and computes what torch does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from text_models import LENGTH, expected, ids, in_groups, text_candidate
from torch import Tensor, nn

from edgecomp.errors import InputError
from edgecomp.exporters import tflite_blocks
from edgecomp.exporters.tflite import TFLiteExporter
from edgecomp.runtimes.litert import LiteRTRuntime
from edgecomp.spec import Artifact, Candidate, Data, TensorSpec


def export(candidate: Candidate, path: Path) -> Artifact:
    return TFLiteExporter("tflite-int4").export(candidate, Data(), path)


def run(artifact: Artifact, optimize: bool = True) -> np.ndarray:
    session = LiteRTRuntime().open(artifact.path, optimize=optimize)
    return session.run([ids().astype(session.inputs[0].dtype)])[0]


class Table(nn.Module):
    """Rows of a table times one: embeddings alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(96, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) * 1.5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 32, None])
def test_rows_of_a_table_are_restored_exactly(
    tmp_path: Path, group_size: int | None, symmetric: bool
) -> None:
    begun = Candidate(Table().eval(), (TensorSpec("ids", (1, LENGTH), "int64"),))
    candidate = in_groups(begun, group_size=group_size, symmetric=symmetric)
    artifact = export(candidate, tmp_path / "m.tflite")
    np.testing.assert_allclose(run(artifact), expected(candidate, ids()), rtol=1e-6)
    assert artifact.size_bytes < 96 * 64 // 2 + 96 * 64 // 16 * 8 + 6000


@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("optimize", [True, False])
def test_the_file_computes_what_the_restored_weights_do(
    tmp_path: Path, group_size: int | None, optimize: bool
) -> None:
    """Activations are int8 at run time, so within a percent or so."""
    candidate = in_groups(text_candidate(), group_size=group_size, narrow=True)
    artifact = export(candidate, tmp_path / "m.tflite")
    found, reference = run(artifact, optimize), expected(candidate, ids())
    assert np.abs(found - reference).max() < 0.03 * np.abs(reference).max()
    assert not artifact.skipped


def test_the_most_negative_integer_is_clipped_and_listed(tmp_path: Path) -> None:
    """Kernels without XNNPACK would give wrong sums (LiteRT 2.3.0)."""
    candidate = in_groups(text_candidate(), group_size=64)
    assert candidate.quantization.weights["down.weight"].values.min() == -8
    artifact = export(candidate, tmp_path / "m.tflite")
    assert any("are -7, not -8" in p.reason and p.module == "down" for p in artifact.skipped)
    found, reference = run(artifact, optimize=False), expected(candidate, ids())
    assert np.abs(found - reference).max() < 0.1 * np.abs(reference).max()


@pytest.mark.parametrize("settings", [{"group_size": 16}, {"symmetric": False}])
def test_what_tflite_cannot_store_is_rounded_again_and_listed(tmp_path: Path, settings: dict) -> None:
    candidate = in_groups(text_candidate(), **settings)
    artifact = export(candidate, tmp_path / "m.tflite")
    assert "rounded again" in artifact.skipped[0].reason
    found, reference = run(artifact), expected(candidate, ids())
    assert np.abs(found - reference).max() < 0.3 * np.abs(reference).max()


def test_halves_of_a_row_share_bytes() -> None:
    packed = tflite_blocks.halves(np.array([[-8, 0, 7, -1]], np.int8))
    np.testing.assert_array_equal(packed, [[0xF0, 0x78]])


@pytest.mark.parametrize(
    "settings",
    [
        {"group_size": 16},
        {"symmetric": False},
        {"group_size": None, "symmetric": False},
        {"bits": 8},
    ],  # fmt: skip
)
@pytest.mark.parametrize("optimize", [True, False])
def test_with_float_activations_every_plan_is_stored_and_computed_as_it_is(
    tmp_path: Path, settings: dict, optimize: bool
) -> None:
    """Also what LiteRT's own 4-bit kernels cannot take: small groups, zero points, -8, groups of 8 bits."""
    candidate = in_groups(text_candidate(), **settings)
    exporter = TFLiteExporter("tflite-int4", activations="float")
    artifact = exporter.export(candidate, Data(), tmp_path / "m.tflite")
    found, reference = run(artifact, optimize), expected(candidate, ids())
    np.testing.assert_allclose(found, reference, atol=2e-5 * np.abs(reference).max())
    assert not artifact.skipped


def test_groups_of_eight_bits_are_rounded_again_a_channel_and_listed(tmp_path: Path) -> None:
    candidate = in_groups(text_candidate(), bits=8, narrow=True)
    artifact = export(candidate, tmp_path / "m.tflite")
    assert any("8 bits a channel" in p.reason and p.module == "down" for p in artifact.skipped)
    found, reference = run(artifact), expected(candidate, ids())
    assert np.abs(found - reference).max() < 0.03 * np.abs(reference).max()


def test_float_activations_are_a_setting_of_four_bits() -> None:
    with pytest.raises(InputError, match="activations is 'int16'; expected int8 or float"):
        TFLiteExporter("tflite-int4", activations="int16")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a setting of tflite-int4, not of tflite-fp32"):
        TFLiteExporter("tflite-fp32", activations="float")


@pytest.mark.parametrize("bits, stored", [(3, 4), (6, 8)])
def test_other_widths_take_the_next_wider_and_are_listed(tmp_path: Path, bits: int, stored: int) -> None:
    candidate = in_groups(text_candidate(), bits=bits)
    exporter = TFLiteExporter("tflite-int4", activations="float")
    artifact = exporter.export(candidate, Data(), tmp_path / "m.tflite")
    found, reference = run(artifact), expected(candidate, ids())
    np.testing.assert_allclose(found, reference, atol=2e-5 * np.abs(reference).max())
    assert any(f"{bits} bits are stored in {stored}" in p.reason for p in artifact.skipped)
