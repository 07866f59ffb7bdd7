"""Shared pieces of the commands: JSON, settings, consoles."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from edgecomp.cli import common
from edgecomp.errors import InputError, OutputError


@dataclass(frozen=True)
class Figure:
    name: str
    values: tuple[float, ...]


def invoke(words: list[str], facts: object = None) -> Result:
    @click.command()
    @common.json_option
    def command(json_path: str | None) -> None:
        common.show({"a": 1} if facts is None else facts, json_path, lambda found: Text(f"table {found}"))

    return CliRunner().invoke(command, words)


def test_without_json_the_table_is_printed() -> None:
    assert invoke([]).stdout == "table {'a': 1}\n"


def test_with_a_dash_stdout_holds_json_only() -> None:
    assert json.loads(invoke(["--json", "-"]).stdout) == {"a": 1}


def test_with_a_path_the_table_is_printed_and_the_file_written(tmp_path: Path) -> None:
    result = invoke(["--json", str(tmp_path / "new" / "facts.json")])
    assert result.stdout.startswith("table")
    assert json.loads((tmp_path / "new" / "facts.json").read_text()) == {"a": 1}


def test_a_json_path_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    result = invoke(["--json", str(tmp_path)])
    assert isinstance(result.exception, InputError)
    assert "is a folder" in str(result.exception)


def test_a_json_path_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke(["--json", str(tmp_path / "file" / "facts.json")])
    assert isinstance(result.exception, OutputError)


def test_json_holds_plain_values() -> None:
    facts = {
        "path": Path("a/b"),
        "array": np.array([1, 2], dtype=np.int8),
        "scalar": np.float32(0.5),
        "figure": Figure("x", (1.0, float("nan"), float("inf"))),
        3: None,
    }
    assert json.loads(common.to_json(facts)) == {
        "path": "a/b",
        "array": [1, 2],
        "scalar": 0.5,
        "figure": {"name": "x", "values": [1.0, None, None]},
        "3": None,
    }


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_what_json_can_say_comes_back_unchanged(value: object) -> None:
    assert json.loads(common.to_json(value)) == value


def test_settings_take_their_type_from_yaml() -> None:
    pairs = ["ratio=0.5", "layers=[a, b]", "name=conv=1", "freeze-bn=true", "path="]
    assert common.parse_settings(pairs) == {
        "ratio": 0.5,
        "layers": ["a", "b"],
        "name": "conv=1",
        "freeze_bn": True,
        "path": None,
    }


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["ratio"], "'ratio' does not read KEY=VALUE"),
        (["=3"], "does not read KEY=VALUE"),
        (["a b=3"], "does not read KEY=VALUE"),
        (["ratio=1", "ratio=2"], "'ratio' is given twice"),
        (["layers=[a"], "not valid YAML"),
        (["x=!!python/object/apply:os.system [ls]"], "not valid YAML"),
    ],
)
def test_a_setting_that_cannot_be_read_is_named(pairs: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        common.parse_settings(pairs)


def test_brackets_are_text_and_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    common.stdout().print("pip install 'edgecomp[tflite]'")
    assert capsys.readouterr().out == "pip install 'edgecomp[tflite]'\n"


def test_a_pipe_and_no_color_turn_colours_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert common.stdout().color_system is None
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert common.stdout().color_system is not None
    monkeypatch.setenv("NO_COLOR", "1")
    assert common.stdout().no_color


def test_out_is_checked_before_the_work(tmp_path: Path) -> None:
    @click.command()
    @common.out_option("Where artifacts go.")
    def command(out: Path) -> None:
        click.echo(out)

    (tmp_path / "file").write_text("")
    assert CliRunner().invoke(command, ["--out", str(tmp_path / "new")]).exit_code == 0
    assert list((tmp_path / "new").iterdir()) == []
    assert isinstance(CliRunner().invoke(command, ["--out", str(tmp_path / "file")]).exception, OutputError)
