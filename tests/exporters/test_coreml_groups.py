"""coreml-int4 stores the integers that quantize-weights decided, and computes what torch does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from text_models import expected, ids, in_groups, text_candidate

from edgecomp.exporters.coreml import CoreMLExporter
from edgecomp.runtimes.coreml import CoreMLRuntime
from edgecomp.spec import Artifact, Candidate, Data


def export(candidate: Candidate, path: Path) -> Artifact:
    return CoreMLExporter("coreml-int4", compute_precision="float32").export(candidate, Data(), path)


def run(artifact: Artifact) -> np.ndarray:
    return CoreMLRuntime().open(artifact.path).run([ids().astype(np.int32)])[0]


@pytest.mark.parametrize("group_size, symmetric", [(32, True), (16, False), (None, True)])
def test_the_package_computes_what_the_restored_weights_do(
    tmp_path: Path, group_size: int | None, symmetric: bool
) -> None:
    candidate = in_groups(text_candidate(bias=True), group_size=group_size, symmetric=symmetric)
    artifact = export(candidate, tmp_path / "m.mlpackage")
    np.testing.assert_allclose(run(artifact), expected(candidate, ids()), rtol=1e-4, atol=1e-4)
    assert not [p for p in artifact.skipped if p.op != "mul"]


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    sizes = [
        export(in_groups(text_candidate(tied=tied)), tmp_path / f"{tied}.mlpackage").size_bytes
        for tied in (True, False)
    ]
    assert sizes[1] - sizes[0] > 96 * 64 // 2


def test_a_layer_that_the_plan_leaves_float_is_listed(tmp_path: Path) -> None:
    candidate = in_groups(text_candidate(), exclude=("down",))
    artifact = export(candidate, tmp_path / "m.mlpackage")
    assert ("down.weight", "the plan has no integers for it") in [
        (p.module, p.reason) for p in artifact.skipped
    ]
    np.testing.assert_allclose(run(artifact), expected(candidate, ids()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits, symmetric", [(2, True), (3, False), (6, True)])
def test_every_width_is_stored_as_it_is(tmp_path: Path, bits: int, symmetric: bool) -> None:
    """Indices into a table of integers, whose scales restore them: no width takes a wider one."""
    candidate = in_groups(text_candidate(), bits=bits, embedding_bits=bits, symmetric=symmetric)
    artifact = export(candidate, tmp_path / "m.mlpackage")
    session = CoreMLRuntime().open(artifact.path)
    found = session.run([ids().astype(np.int32)])[0]
    np.testing.assert_allclose(found, expected(candidate, ids()), rtol=1e-4, atol=1e-4)
    stored = {w.name: w.bits for w in session.stored_weights() if "down" in w.name or "gate" in w.name}
    assert len(stored) == 2
    assert all(bits < b <= bits + 1 + (0 if symmetric else 0.5) for b in stored.values())
