"""`import edgecomp`, `edgecomp --help` and the help of every command load no heavy library."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgecomp.cli import COMMANDS

HEAVY = {
    "adbutils",
    "ai_edge_litert",
    "coremltools",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "paramiko",
    "scipy",
    "tensorflow",
    "tflite_runtime",
    "torch",
    "transformers",
}


def loaded_after(statements: str) -> set[str]:
    """Top-level modules that a fresh Python has loaded after running `statements`."""
    script = f"{statements}\nimport sys\nprint()\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def command_line(*words: str) -> str:
    return f"from edgecomp.cli import main\nmain.main({list(words)!r}, standalone_mode=False)"


@pytest.mark.parametrize(
    "statements",
    [
        "import edgecomp",
        "import edgecomp.registry\nedgecomp.registry.names('exporters')",
        command_line("--help"),
        command_line("--version"),
        command_line("targets"),
        command_line("doctor"),
    ],
)
def test_no_heavy_library_is_loaded(statements: str) -> None:
    assert loaded_after(statements) & HEAVY == set()


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_help_of_a_command_loads_no_heavy_library(name: str) -> None:
    assert loaded_after(command_line(name, "--help")) & HEAVY == set()


def test_the_check_sees_a_heavy_library() -> None:
    assert loaded_after("import jinja2") & HEAVY == {"jinja2"}
