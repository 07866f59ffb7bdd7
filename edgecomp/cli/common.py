"""What the commands share: arguments, `--json`, and the two consoles (results out, progress err)."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml
from rich.console import Console, RenderableType

from edgecomp import files, plain_yaml
from edgecomp.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])

# Tables are not squeezed into 80 columns when nobody is looking at a terminal.
_PIPE_WIDTH = 160


class _Console(Console):
    """Rich's console exits with 1 when the reader goes away; that is a failed gate's code here."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def stdout() -> Console:
    """Console of results. Colours only on a terminal and without NO_COLOR; `[...]` is not markup."""
    return _console(stderr=False)


def stderr() -> Console:
    """Console of progress and notes."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return _Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def json_option(command: F) -> F:
    """Add `--json PATH|-` (parameter `json_path`); a path that cannot be written fails before the work."""
    return click.option(
        "--json",
        "json_path",
        metavar="PATH|-",
        callback=_check_json_path,
        help="Write the same facts as JSON to PATH; with - print the JSON only.",
    )(command)


def _check_json_path(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value in (None, "-"):
        return value
    path = Path(str(value))
    if path.is_dir():
        raise InputError(f"--json {value} is a folder; expected the name of a file, or - for stdout")
    files.check_writable(path.parent)
    return value


def show(facts: Any, json_path: str | None, render: Callable[[Any], RenderableType]) -> None:
    """Print `render(facts)` on stdout; with a `json_path` write the facts there too (`-`: JSON only)."""
    if json_path == "-":
        click.echo(to_json(facts))
        return
    if json_path:
        with files.atomic(Path(json_path)) as temporary:
            temporary.write_text(to_json(facts) + "\n")
    stdout().print(render(facts))


def to_json(facts: Any) -> str:
    """Facts as indented JSON: dataclasses, paths, NumPy values; NaN and infinities become null."""
    return json.dumps(_plain(facts), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy arrays and scalars
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """`("ratio=0.5", "layers=[a, b]")` -> `{"ratio": 0.5, "layers": ["a", "b"]}`; values are YAML.

    Raises InputError for a pair without `=`, a key given twice, or a value that is not YAML.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise InputError(f"setting {pair!r} does not read KEY=VALUE, as in ratio=0.5")
        if key in settings:
            raise InputError(f"setting {key!r} is given twice; give it once")
        try:
            settings[key] = plain_yaml.load(text)
        except yaml.YAMLError as error:
            raise InputError(f"the value of setting {pair!r} is not valid YAML: quote it") from error
    return settings


def set_option(command: F) -> F:
    """Add repeatable `--set KEY=VALUE` (parameter `settings`, for `parse_settings`)."""
    return click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of the step; repeatable."
    )(command)


def model_argument(command: F) -> F:
    """Add the positional MODEL (parameter `model`)."""
    return click.argument("model", metavar="MODEL")(command)


def artifact_argument(command: F) -> F:
    """Add the positional ARTIFACT (parameter `artifact`, a Path that is checked by manifest.read)."""
    return click.argument("artifact", metavar="ARTIFACT", type=click.Path(path_type=Path))(command)


def data_option(name: str, help_text: str, *, required: bool = False) -> Callable[[F], F]:
    """Make an option whose value is a data SRC: `@data_option("--data", "Evaluation data.")`."""
    return click.option(name, metavar="SRC", required=required, help=help_text)


def out_option(help_text: str, *, required: bool = True) -> Callable[[F], F]:
    """Make `--out DIR` (parameter `out`); the folder is checked before the work starts."""
    return click.option(
        "--out",
        metavar="DIR",
        required=required,
        type=click.Path(path_type=Path),
        callback=_check_out,
        help=help_text,
    )


def _check_out(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None:
        files.check_writable(value)
    return value
