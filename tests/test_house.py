"""The rules of docs/architecture.md, read from the source: who may import whom, and how files are built."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OUTER_ROOMS = ("exporters", "runtimes", "devices", "calibration_data")
MAX_LINES = 450

NOUNS = {"spec", "errors", "files", "door", "manifest", "registry", "progress", "__init__"}
BASE = {"nouns", "numerics"}
# Room -> rooms that it may import, itself left out. "chain" is recipe, pipeline, models and their like.
MAY_IMPORT = {
    "nouns": set(),
    "numerics": {"nouns"},
    "graph": BASE,
    "compress": BASE | {"graph"},
    "language": BASE | {"graph"},
    "exporters": BASE | {"graph", "language"},
    "runtimes": BASE,
    "devices": BASE,
    "calibration_data": BASE,
    "parity": BASE,
    "report": BASE,
    "chain": BASE | {"graph", "compress", "parity", "report", "language"},
    "demo": BASE | {"graph", "compress", "calibration_data", "chain"},
    "cli": BASE | {"chain", "parity", "report", "language"},
}
# Room, or room and the first word of the file's name -> third-party packages that it may import.
LIBRARIES = {
    "nouns": {"numpy", "tqdm"},
    "numerics": {"numpy"},
    "graph": {"numpy", "torch"},
    "compress": {"numpy", "torch"},
    "language": {"numpy", "torch", "tokenizers", "jinja2"},
    "language/folder": {"transformers"},
    "exporters": {"numpy", "torch"},
    "exporters/tflite": {"ai_edge_litert", "flatbuffers"},
    "exporters/onnx": {"onnx"},
    "exporters/coreml": {"coremltools", "google"},
    "runtimes": {"numpy"},
    "runtimes/litert": {"ai_edge_litert", "flatbuffers", "tflite_runtime", "tensorflow"},
    "runtimes/onnxruntime": {"onnxruntime", "onnx"},
    "runtimes/coreml": {"coremltools", "google", "torch"},
    "devices": {"numpy", "platformdirs"},
    "devices/ssh": {"paramiko"},
    "devices/adb": {"adbutils"},
    "devices/apple": {"coremltools"},
    "devices/agent": {"ai_edge_litert", "tflite_runtime", "tensorflow", "onnxruntime"},
    "calibration_data": {"numpy", "PIL"},
    "parity": {"numpy", "torch"},
    "report": {"jinja2", "markupsafe", "yaml"},
    "chain": {"numpy", "torch", "yaml", "pydantic"},
    "chain/search": {"optuna"},
    "demo": {"numpy", "torch", "click"},
    "cli": {"click", "rich", "yaml", "numpy", "platformdirs"},
}
HEAVY = {
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "coremltools",
    "ai_edge_litert",
    "tensorflow",
    "matplotlib",
}
# Files that choose among libraries, or run where we cannot know what is installed.
MAY_BE_LAZY = {"runtimes/litert.py", "devices/agent.py"}


@dataclass(frozen=True)
class Import:
    """One imported name: `module` as written, and whether it is done when the file is loaded."""

    module: str
    at_top: bool


def sources() -> list[Path]:
    found = [p for folder in ("edgecomp", *OUTER_ROOMS) for p in (ROOT / folder).rglob("*.py")]
    return sorted(p.relative_to(ROOT) for p in found)


def module_of(file: Path) -> str:
    parts = file.with_suffix("").parts
    parts = parts if parts[0] == "edgecomp" else ("edgecomp", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """`edgecomp.cli.run` -> `cli`; `edgecomp.spec` -> `nouns`; `edgecomp.pipeline` -> `chain`."""
    parts = module.split(".")
    second = parts[1] if len(parts) > 1 else "__init__"
    if second in MAY_IMPORT:
        return second
    if second == "__main__":
        return "cli"
    return "nouns" if second in NOUNS or second == "__version__" else "chain"


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(), str(file))


@cache
def imports(file: Path) -> tuple[Import, ...]:
    top = set(map(id, _at_top(tree(file))))
    found = []
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [Import(name, id(node) in top) for name in _names(node)]
    return tuple(found)


def _names(node: ast.ImportFrom) -> list[str]:
    """`from edgecomp.a import b` names `edgecomp.a.b`, so that a sub-module counts as itself."""
    if node.level or node.module is None:
        return ["." * node.level + (node.module or "")]
    if node.module.split(".")[0] == "edgecomp":
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [node.module]


def _at_top(module: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the file is loaded; `if TYPE_CHECKING:` does not."""
    waiting: list[ast.stmt] = list(module.body)
    while waiting:
        statement = waiting.pop()
        yield statement
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test):
            continue
        for field in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                waiting += getattr(statement, field, [])


FILES = sources()
by_file = pytest.mark.parametrize("file", FILES, ids=str)


def test_the_rooms_are_all_there() -> None:
    assert {room_of(module_of(f)) for f in FILES} == set(MAY_IMPORT)


@by_file
def test_imports_flow_one_way(file: Path) -> None:
    room = room_of(module_of(file))
    ours = {i.module for i in imports(file) if i.module.split(".")[0] == "edgecomp"}
    used = {room_of(name) for name in ours} - {room}
    if file.name == "agent.py":
        assert not ours, "the agent runs on the device, alone"
    assert used <= MAY_IMPORT[room], f"{room} may not import {used - MAY_IMPORT[room]}"


@by_file
def test_no_import_is_relative_or_of_a_room_at_the_top_level(file: Path) -> None:
    names = {i.module for i in imports(file)}
    assert not {n for n in names if n.startswith(".")}
    assert not {n for n in names if n.split(".")[0] in (*OUTER_ROOMS, "tests")}


@by_file
def test_a_library_is_imported_only_where_it_belongs(file: Path) -> None:
    module = module_of(file)
    room, stem = room_of(module), file.stem.split("_")[0]
    allowed = LIBRARIES[room] | LIBRARIES.get(f"{room}/{stem}", set())
    known = sys.stdlib_module_names | {"edgecomp"}
    used = {i.module.split(".")[0] for i in imports(file)} - known
    assert used <= allowed, f"{used - allowed} does not belong in {file}"


@by_file
def test_a_heavy_library_is_imported_at_the_top_of_its_file(file: Path) -> None:
    if str(file) in MAY_BE_LAZY:
        return
    late = {i.module for i in imports(file) if i.module.split(".")[0] in HEAVY and not i.at_top}
    assert not late, f"laziness lives in registry and in the loading of commands, not in {file}: {late}"


@by_file
def test_files_stay_short(file: Path) -> None:
    if file.name == "agent.py":  # one file by design: it is copied to the device alone
        assert (ROOT / file).stat().st_size < 50_000
        return
    lines = len((ROOT / file).read_text().splitlines())
    assert lines <= MAX_LINES, f"{file} has {lines} lines: split it"


@by_file
def test_input_is_not_checked_by_assert(file: Path) -> None:
    lines = [n.lineno for n in ast.walk(tree(file)) if isinstance(n, ast.Assert)]
    assert not lines, f"{file}: assert vanishes under python -O; raise an error of edgecomp.errors: {lines}"


@by_file
def test_no_file_prints_except_the_agent_and_scripts(file: Path) -> None:
    if file.parts[0] == "edgecomp" and file.parts[1] in ("cli", "demo") or file.name == "agent.py":
        return
    calls = [n for n in ast.walk(tree(file)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    lines = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
    assert not lines, f"{file}: results are printed by cli, progress by edgecomp.progress: {lines}"


@by_file
def test_nothing_is_left_to_do(file: Path) -> None:
    text = (ROOT / file).read_text()
    assert not {word for word in ("TO" + "DO", "FIX" + "ME", "XX" + "X") if word in text}
    functions = [n for n in ast.walk(tree(file)) if isinstance(n, ast.FunctionDef)]
    stubs = [f.name for f in functions if isinstance(f.body[-1], ast.Raise) and _is_stub(f.body)]
    assert not stubs


def _is_stub(body: list[ast.stmt]) -> bool:
    """Nothing but a docstring and `raise NotImplementedError`."""
    rest = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return len(rest) == 1 and "NotImplementedError" in ast.dump(rest[0])


def test_no_module_imports_itself_through_others() -> None:
    modules = {module_of(f): f for f in FILES}
    graph = {name: _needed(name, file, modules) for name, file in modules.items()}
    done: set[str] = set()
    for name in graph:
        _walk(name, graph, [], done)


def _needed(name: str, file: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of ours that must be loaded before `file` is: the name itself, or the module that holds it."""
    wanted = {i.module for i in imports(file) if i.at_top and i.module.startswith("edgecomp")}
    found = {w if w in modules else w.rpartition(".")[0] for w in wanted}
    return {f for f in found if f in modules and f != name}


def _walk(name: str, graph: dict[str, set[str]], path: list[str], done: set[str]) -> None:
    assert name not in path, "cycle: " + " -> ".join([*path[path.index(name) :], name])
    if name in done:
        return
    for following in sorted(graph[name]):
        _walk(following, graph, [*path, name], done)
    done.add(name)


def test_the_folders_at_the_root_are_the_rooms_and_no_more() -> None:
    allowed = {"edgecomp", *OUTER_ROOMS, "tests", "docs", "examples", "benchmarks", "scripts"}
    seen = {p.parts[0] for p in (f.relative_to(ROOT) for f in ROOT.glob("*/*.py")) if p.parts[0] != "build"}
    assert seen <= allowed


def test_packages_and_rooms_agree() -> None:
    import tomllib

    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {module_of(f.parent / "__init__.py") for f in FILES}
    assert folders <= set(facts["packages"])
    assert set(facts["package-dir"]) == {f"edgecomp.{room}" for room in OUTER_ROOMS}
