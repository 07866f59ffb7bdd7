"""onnx-int4: MatMulNBits and GatherBlockQuantized hold the plan's integers, and compute what torch does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from text_models import expected, ids, in_groups, text_candidate
from torch import nn

from edgecomp.errors import InputError, UnsupportedOpError
from edgecomp.exporters import onnx_int4
from edgecomp.exporters.onnx import OnnxExporter
from edgecomp.numerics import groupwise
from edgecomp.runtimes.onnxruntime import OnnxRuntime
from edgecomp.spec import Candidate, Data, TensorSpec


def export(candidate: Candidate, path: Path, **settings: object) -> tuple[onnx.ModelProto, np.ndarray]:
    exporter = OnnxExporter("onnx-int4", **{"accuracy_level": 1, **settings})  # type: ignore[arg-type]
    artifact = exporter.export(candidate, Data(), path)
    session = OnnxRuntime().open(artifact.path)
    return onnx.load(path), session.run([ids()])[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 32, 64, None])
def test_the_file_computes_what_the_restored_weights_do(
    tmp_path: Path, symmetric: bool, group_size: int | None
) -> None:
    candidate = in_groups(text_candidate(bias=True), symmetric=symmetric, group_size=group_size)
    _, found = export(candidate, tmp_path / "m.onnx")
    np.testing.assert_allclose(found, expected(candidate, ids()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bits_too(tmp_path: Path, symmetric: bool) -> None:
    candidate = in_groups(text_candidate(), bits=8, embedding_bits=8, symmetric=symmetric)
    _, found = export(candidate, tmp_path / "m.onnx")
    np.testing.assert_allclose(found, expected(candidate, ids()), rtol=1e-4, atol=1e-4)


def test_int8_activations_stay_close(tmp_path: Path) -> None:
    candidate = in_groups(text_candidate())
    _, found = export(candidate, tmp_path / "m.onnx", accuracy_level=4)
    reference = expected(candidate, ids())
    assert np.abs(found - reference).max() < 0.03 * np.abs(reference).max()


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    tied, _ = export(in_groups(text_candidate()), tmp_path / "tied.onnx")
    apart, _ = export(in_groups(text_candidate(tied=False)), tmp_path / "apart.onnx")
    kinds = [n.op_type for n in tied.graph.node]
    assert kinds.count("MatMulNBits") == 4 and kinds.count("GatherBlockQuantized") == 1
    sizes = [sum(len(t.raw_data) for t in m.graph.initializer) for m in (tied, apart)]
    assert sizes[1] - sizes[0] == 96 * 64 // 2 + 96 * 2 * 4  # nibbles and float32 scales


def test_an_excluded_layer_stays_float_and_is_listed(tmp_path: Path) -> None:
    candidate = in_groups(text_candidate(), exclude=("down",))
    artifact = OnnxExporter("onnx-int4").export(candidate, Data(), tmp_path / "m.onnx")
    assert [(p.module, p.reason) for p in artifact.skipped] == [("down", "excluded by 'down'")]
    found = OnnxRuntime().open(artifact.path).run([ids()])[0]
    assert np.abs(found - expected(candidate, ids())).max() < 0.05 * np.abs(found).max()


def test_without_a_plan_weights_are_rounded_here_and_fallbacks_listed(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(80, 64), nn.ReLU(), nn.Linear(64, 2))
    begun = Candidate(module.eval(), (TensorSpec("x", (1, 80)),))
    artifact = OnnxExporter("onnx-int4", accuracy_level=1).export(begun, Data(), tmp_path / "m.onnx")
    assert [p.reason for p in artifact.skipped] == [
        "groups of 16, not groups of 32, which do not divide 80 inputs",
        "128 weights; at least 256 are needed for blocks to pay",
    ]
    x = torch.rand(1, 80)
    found = OnnxRuntime().open(artifact.path).run([x.numpy()])[0]
    np.testing.assert_allclose(found, module(x).detach().numpy(), atol=0.1)


@pytest.mark.parametrize("inputs", [100, 33])
def test_inputs_that_no_block_divides_are_padded(tmp_path: Path, inputs: int) -> None:
    """One scale a channel; the last block is filled up with zeros."""
    begun = Candidate(nn.Linear(inputs, 12).eval(), (TensorSpec("x", (1, inputs)),))
    candidate = in_groups(begun, symmetric=False)
    path = tmp_path / "m.onnx"
    artifact = OnnxExporter("onnx-int4", accuracy_level=1).export(candidate, Data(), path)
    x = np.random.default_rng(0).normal(size=(1, inputs)).astype(np.float32)
    found = OnnxRuntime().open(artifact.path).run([x])[0]
    np.testing.assert_allclose(found, expected(candidate, x), rtol=1e-4, atol=1e-4)


def test_nibbles_are_packed_low_first_with_their_offset() -> None:
    grid = groupwise.Grid(4, False, 16)
    values = np.arange(-8, 8, dtype=np.int8)[None]
    q = groupwise.assemble(values, np.ones((1, 1)), np.array([[3]]), grid, (1, 16))
    blocks = onnx_int4.packed(q)
    assert blocks.packed.tobytes() == bytes([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE])
    assert blocks.zero is not None and blocks.zero.tobytes() == bytes([0x0B])


def test_a_plan_of_weights_alone_is_no_qdq(tmp_path: Path) -> None:
    candidate = in_groups(text_candidate())
    with pytest.raises(UnsupportedOpError, match="rounds weights alone"):
        OnnxExporter("onnx-qdq").export(candidate, Data(), tmp_path / "m.onnx")


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="group_size is 48"):
        OnnxExporter("onnx-int4", group_size=48)
    with pytest.raises(InputError, match="accuracy_level is 7"):
        OnnxExporter("onnx-int4", accuracy_level=7)


@pytest.mark.parametrize("bits, stored", [(2, 2), (3, 4), (6, 8)])
def test_a_width_that_the_file_cannot_hold_takes_the_next_wider(
    tmp_path: Path, bits: int, stored: int
) -> None:
    candidate = in_groups(text_candidate(), bits=bits, embedding_bits=bits)
    exporter = OnnxExporter("onnx-int4", accuracy_level=1)
    artifact = exporter.export(candidate, Data(), tmp_path / "m.onnx")
    session = OnnxRuntime().open(artifact.path)
    reference = expected(candidate, ids())
    np.testing.assert_allclose(
        session.run([ids()])[0], reference, rtol=1e-3, atol=1e-4 * np.abs(reference).max()
    )
    wider = [p.reason for p in artifact.skipped if f"are stored in {stored}" in p.reason]
    assert bool(wider) == (bits != stored)
    found = {w.name: w.bits for w in session.stored_weights() if "down" in w.name}
    assert found and all(stored <= b <= stored + 1 for b in found.values())


def test_two_bits_are_packed_four_to_a_byte() -> None:
    packed = onnx_int4._in_bytes(np.array([[0, 1, 2, 3, 3]], np.uint8), 2)
    assert packed.tobytes() == bytes([0b11100100, 0b00000011])
