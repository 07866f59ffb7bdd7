"""From an exception to one paragraph on stderr and an exit code; loaded only when something failed."""

from __future__ import annotations

import errno
import os
import sys
import traceback

import click

from edgecomp.errors import EdgecompError

WRONG_USAGE = 2
MISSING = 3
BUG = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130
PIPE_CLOSED = 141

# What the user can mend: rights, space, a file system that is read-only.
_OF_THE_MACHINE = {errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT}


def report(error: Exception, *, debug: bool = False) -> int:
    """Print the paragraph of `error` (after its traceback, when `debug`) and return the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader went away (`edgecomp targets | head -1`): nothing to say, nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return PIPE_CLOSED
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return WRONG_USAGE
    paragraph, code = explain(error)
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    print(f"edgecomp: {paragraph}", file=sys.stderr)
    return code


def explain(error: Exception) -> tuple[str, int]:
    """The paragraph and the exit code of an exception."""
    if isinstance(error, EdgecompError):
        return str(error), error.exit_code
    if isinstance(error, click.Abort):
        return "interrupted; files under their final names are complete, nothing half-written is left", (
            INTERRUPTED
        )
    if isinstance(error, click.ClickException):
        return _usage(error), WRONG_USAGE
    if isinstance(error, ModuleNotFoundError) and not (error.name or "edgecomp").startswith("edgecomp"):
        name = (error.name or "").partition(".")[0]
        return f"this command needs {name}, which is not installed: pip install {name}", MISSING
    if isinstance(error, MemoryError):
        return (
            "this machine has too little memory for the work; use fewer samples or a smaller batch",
            MISSING,
        )
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return f"cannot use {error.filename or 'a file'}: {error.strerror}", WRONG_USAGE
    return (
        f"a bug in edgecomp, not in your input: {type(error).__name__}: {_first_line(error)}; run the same "
        "command with --debug and report what it prints",
        BUG,
    )


def _usage(error: click.ClickException) -> str:
    message = error.format_message().strip().rstrip(".")
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "edgecomp"
    link = " See" if message.endswith("?") else "; see"
    return f"{message[:1].lower()}{message[1:]}{link} `{where} --help`"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
