"""The group: lazy loading, one paragraph for each error, the exit codes of docs/contract.md."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from edgecomp import errors
from edgecomp.cli import COMMANDS, LazyGroup, failure, main


def outcome(monkeypatch: pytest.MonkeyPatch, error: BaseException, *words: str) -> Result:
    """Run a command that raises `error` through the real group."""

    @click.command("audit")
    def command() -> None:
        raise error

    monkeypatch.setattr(LazyGroup, "get_command", lambda *_: command)
    return CliRunner().invoke(main, [*words, "audit"])


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_listed_command_has_a_file_and_answers_help(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert name in result.stdout.splitlines()[0]


def test_help_lists_every_command_with_its_line() -> None:
    text = CliRunner().invoke(main, ["--help"]).stdout
    assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.GateFailed("top1 0.7"), 1),
        (errors.RecipeError("key 'stepz'"), 2),
        (errors.MissingError("needs onnx"), 3),
        (errors.DeviceError("pi5 went away"), 4),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device", "/full/x"), 2),
        (ModuleNotFoundError("No module named 'jinja2'", name="jinja2"), 3),
        (MemoryError(), 3),
        (ZeroDivisionError("division by zero"), 70),
        (ModuleNotFoundError("No module named 'edgecomp.x'", name="edgecomp.x"), 70),
    ],
)
def test_an_error_is_one_paragraph_on_stderr(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    result = outcome(monkeypatch, error)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.strip().startswith("edgecomp: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("words", [("--debug", "audit"), ("audit", "--debug")])
def test_debug_shows_the_traceback_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    @click.command("audit")
    def command() -> None:
        raise errors.DataError("empty")

    monkeypatch.setattr(LazyGroup, "get_command", lambda *_: command)
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.strip().endswith("edgecomp: empty")


def test_debug_after_two_dashes_belongs_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("audit")
    @click.argument("word")
    def command(word: str) -> None:
        click.echo(word)

    monkeypatch.setattr(LazyGroup, "get_command", lambda *_: command)
    assert CliRunner().invoke(main, ["audit", "--", "--debug"]).stdout == "--debug\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["exprt"], "unknown command 'exprt'; did you mean 'export'?"),
        (["targets", "--jsn", "-"], "--json"),
        (["--versio"], "--version"),
        (["inspect"], "missing argument 'ARTIFACT'; see `edgecomp inspect --help`"),
    ],
)
def test_wrong_usage_names_the_nearest_word(words: list[str], expected: str) -> None:
    result = CliRunner().invoke(main, words, prog_name="edgecomp")
    assert result.exit_code == 2
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_without_arguments_the_help_goes_to_stderr() -> None:
    result = CliRunner().invoke(main, [])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Commands:" in result.stderr


def test_a_library_caller_gets_the_exception_itself() -> None:
    with pytest.raises(errors.UnknownNameError, match="did you mean 'export'"):
        main.main(["exprt"], standalone_mode=False)


def test_a_multi_line_message_of_a_bug_is_cut_to_its_first_line() -> None:
    paragraph, code = failure.explain(RuntimeError("first\nsecond"))
    assert code == failure.BUG
    assert "first" in paragraph and "second" not in paragraph and "--debug" in paragraph


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    writer = subprocess.Popen(
        [sys.executable, "-m", "edgecomp", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout and writer.stderr
    writer.stdout.close()
    complaint = writer.stderr.read()
    writer.stderr.close()
    assert writer.wait(timeout=60) == failure.PIPE_CLOSED
    assert complaint == b""


_SLEEPER = """
import sys, time, click
from pathlib import Path
from edgecomp import cli, files
@click.command("audit")
def command():
    with files.atomic(Path(sys.argv.pop()) / "artifact") as temporary:
        temporary.write_text("half")
        print("ready", flush=True)
        time.sleep(60)
cli.LazyGroup.get_command = lambda *_: command
cli.main(["audit"])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_leaves_no_half_written_file(tmp_path: Path, number: int, code: int) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _SLEEPER, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout and child.stdout.readline() == "ready\n"
    child.send_signal(number)
    _, complaint = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Traceback" not in complaint
    assert list(tmp_path.iterdir()) == []
