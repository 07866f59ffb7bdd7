"""The command line: one file per command, loaded when its name is typed, and one place for errors.

`edgecomp.cli.NAME` holds the click command of NAME in the variable `command`: parse, call, print.
This file stays import-light (click only), so that `edgecomp --help` answers at once.
"""

from __future__ import annotations

import functools
import importlib
import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import click

from edgecomp import __version__

# One line of help each; the command's own file holds the rest.
COMMANDS = {
    "run": "Run a recipe: every step, evaluation, exports, parity, profile, report.",
    "export": "Export one model to one or more targets and check parity.",
    "prune": "Prune a model: one step, a checkpoint in, a checkpoint out.",
    "distill": "Distil a teacher into a student.",
    "quantize": "Quantize a model to INT8 with calibration data.",
    "parity": "Compare artifacts with the float model; gates decide the exit code.",
    "profile": "Measure latency, memory and per-op time on a device.",
    "devices": "List, add, check or remove devices.",
    "inspect": "Show what an artifact takes, gives and holds, and what stayed float.",
    "verify": "Replay the golden inputs and outputs that travel with an artifact.",
    "audit": "Say whether calibration data is fit for use.",
    "rebuild": "Run a finished run's recipe again and compare the artifacts byte for byte.",
    "targets": "List the targets, and which of them can be built here.",
    "doctor": "Show what this machine has, what is missing and how to get it.",
    "diagnose": "Search for the preprocessing fault behind outputs that disagree.",
    "search": "Search over a recipe's settings for the best of metric, bytes, latency.",
    "export-decoder": "Export a causal language model with its cache and tokenizer.",
    "refusals": "Compare which prompts two language models refuse.",
    "generate": "Write the text that follows a prompt, with an exported decoder.",
    "init": "Look at a model and write a recipe for it.",
    "schema": "Print the JSON Schema of recipes, for editors.",
}


class LazyGroup(click.Group):
    """Finds commands by file name, and turns every failure into one paragraph and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        file = cmd_name.replace("-", "_")
        command: click.Command = importlib.import_module(f"edgecomp.cli.{file}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from edgecomp.errors import UnknownNameError

            raise UnknownNameError("command", name, COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's own, but failures leave through `edgecomp.cli.failure`. `--debug` works anywhere."""
        words, debug = _without_debug(sys.argv[1:] if args is None else list(args))
        plain = functools.partial(
            super().main, words, prog_name, complete_var, windows_expand_args=windows_expand_args, **extra
        )
        if not standalone_mode:
            return plain(standalone_mode=False)
        try:
            result: object = plain(standalone_mode=False)
            sys.stdout.flush()
        except Exception as error:
            from edgecomp.cli import failure

            sys.exit(failure.report(error, debug=debug))
        sys.exit(result if isinstance(result, int) else 0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The entry point of the process: third-party warnings and logs are quiet, and SIGTERM cleans up."""
        if not sys.warnoptions and "--debug" not in sys.argv:
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
        signal.signal(signal.SIGTERM, _terminated)
        return super().__call__(*args, **kwargs)


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """Take `--debug` out of the words before `--`, wherever it stands."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    return kept + words[end:], len(kept) < end


def _terminated(number: int, frame: object) -> None:
    """Leave as an exception would, so that half-written files are removed."""
    sys.exit(128 + number)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error, and third-party warnings.")
@click.version_option(__version__, prog_name="edgecomp", message="%(prog)s %(version)s")
def main(debug: bool) -> None:
    """Take a PyTorch model to phones and boards, and prove that it still behaves.

    MODEL is path/to/file.py:callable, package.module:callable (the callable returns an nn.Module), or a
    .pt2 file. Data SRC is a folder of images or WAV files (sub-folders are labels), an .npz or .npy file,
    a CSV, or path/to/file.py:callable.

    Exit codes: 0 done, 1 a gate failed, 2 wrong usage or bad input, 3 something is missing on this
    machine, 4 a device failed, 70 a bug in edgecomp, 130 interrupted.
    """
