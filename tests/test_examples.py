"""Every recipe in examples/ is one that this version reads; the quickest runs from its float training on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgecomp import recipe, registry

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipe_is_read_and_names_what_exists(path: Path) -> None:
    found = recipe.read(path).recipe
    assert found.name and found.exports
    assert all(step.name in registry.names("steps") for step in found.steps)
    sources = [found.model, *(e.source for _, e in found.data if e is not None)]
    for source in sources:
        file, _, name = source.partition(":")
        text = (EXAMPLES.parent / file).read_text()
        assert f"def {name}(" in text or f"class {name}" in text, source


@pytest.mark.slow
def test_the_recommender_runs_from_a_clean_folder(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    words = [sys.executable, "-m", "edgecomp", "run", "examples/recommender.yaml", "--out", "out"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["verdict"]["passed"] and ledger["steps"][0]["metrics"]["accuracy"] > 0.7
    assert (tmp_path / "build" / "examples" / "recommender.pt").exists()
