"""The wheel: what it holds, and that it works away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("exporters", "runtimes", "devices", "calibration_data")
_SOURCES = ("edgecomp", *ROOMS, "pyproject.toml", "README.md", "LICENSE")


def run(*argv: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Output of a command that must succeed; its last lines are in the failure."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    words = [str(word) for word in argv]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no `build/lib` of an earlier build gets in."""
    copy = tmp_path_factory.mktemp("source")
    for name in _SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", ".", cwd=copy)
    return next((copy / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def expected() -> set[str]:
    """Every source file and every file that package-data names, under the package."""
    python = {p for folder in ("edgecomp", *ROOMS) for p in (ROOT / folder).rglob("*.py")}
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    data: set[Path] = set()
    for package, patterns in facts["package-data"].items():
        folder = ROOT / Path(*package.removeprefix("edgecomp.").split("."))
        folder = folder if folder.is_dir() else ROOT / Path(*package.split("."))
        data |= {p for pattern in patterns for p in folder.glob(pattern) if p.is_file()}
    relative = {p.relative_to(ROOT) for p in python | data}
    return {str(p if p.parts[0] == "edgecomp" else Path("edgecomp") / p) for p in relative}


def test_the_wheel_holds_the_sources_and_the_data_and_nothing_else(wheel: Path) -> None:
    found = {name for name in names(wheel) if ".dist-info/" not in name}
    assert found == expected()


def test_nothing_but_edgecomp_is_at_the_top_level(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"edgecomp"}


def test_what_people_rely_on_is_there(wheel: Path) -> None:
    found = names(wheel)
    assert {"edgecomp/py.typed", "edgecomp/cli/run.py", "edgecomp/devices/agent.py"} <= found
    assert {f"edgecomp/{room}/__init__.py" for room in ROOMS} <= found
    for folder, suffix in (
        ("edgecomp/report/", ".j2"),
        ("edgecomp/demo/", ".pt"),
        ("edgecomp/demo/", ".yaml"),
        ("edgecomp/calibration_data/samples/", ""),
    ):
        assert any(name.startswith(folder) and name.endswith(suffix) for name in found), (folder, suffix)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in found)


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 5_000_000


def test_the_installed_copy_runs_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    origin = run(
        sys.executable, "-c", "import edgecomp; print(edgecomp.__file__)", cwd=tmp_path, path=installed
    )
    assert Path(origin.strip()).is_relative_to(installed)
    version = run(installed / "bin" / "edgecomp", "--version", cwd=tmp_path, path=installed)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version.strip() == f"edgecomp {declared}"
    assert "tflite-int8" in run(installed / "bin" / "edgecomp", "targets", cwd=tmp_path, path=installed)


def test_the_installed_copy_brings_its_sample(installed: Path, tmp_path: Path) -> None:
    script = "from edgecomp.calibration_data.sample import fashion_test; print(len(fashion_test()))"
    assert int(run(sys.executable, "-c", script, cwd=tmp_path, path=installed)) >= 1000
