"""Commands for a remote POSIX shell: process groups with a limit, killing, hashes, free space.

Everything a remote command starts stays in two process groups that are told on the first line of stderr, so
that a second connection can kill them; `timeout -k` ends them when nobody is left to do so.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

MARK = "edgecomp-groups"
_GROUPS = re.compile(rf"{MARK} (\d+) (\d+)\n")

# Exit codes of GNU and BusyBox timeout: the limit was over; it had to use SIGKILL.
TIMED_OUT = 124
GRACE_S = 3


def wrapped(argv: Sequence[str], limit_s: float) -> str:
    """A shell line that runs `argv` in groups of its own, ended after `limit_s` seconds.

    Without setsid or timeout (macOS) the command still runs and can be killed; nothing ends it by itself.
    """
    command = shlex.join(argv)
    seconds = max(1, round(limit_s))
    told = f'echo "{MARK} $$ $!" >&2; wait $!; exit $?'
    inner = shlex.quote(f"timeout -k {GRACE_S} {seconds} {command} & {told}")
    plain = f"{command} & {told}"
    return (
        "if setsid -w true 2>/dev/null && command -v timeout >/dev/null 2>&1; "
        f"then exec setsid -w sh -c {inner}; else {plain}; fi"
    )


def groups(stderr: str) -> tuple[tuple[int, ...], str]:
    """The process groups that `wrapped` told, and stderr without that line."""
    found = _GROUPS.search(stderr)
    if not found:
        return (), stderr
    return (int(found[1]), int(found[2])), stderr[: found.start()] + stderr[found.end() :]


def killing(process_groups: Sequence[int]) -> str:
    """A shell line that kills the groups; a single process is killed where it leads no group."""
    lines = [f"kill -KILL -{g} 2>/dev/null || kill -KILL {g} 2>/dev/null" for g in process_groups]
    return "; ".join([*lines, "true"])


def hashing(path: str) -> str:
    """A shell line that prints `size sha256` of a file, or nothing when it is not there."""
    name = shlex.quote(path)
    return (
        f"if [ -f {name} ]; then wc -c < {name}; "
        f"if command -v sha256sum >/dev/null 2>&1; then sha256sum {name}; else shasum -a 256 {name}; fi; fi"
    )


def hashed(stdout: str) -> tuple[int, str] | None:
    """Size and SHA-256 from what `hashing` printed; None when the file is not there."""
    found = re.match(r"\s*(\d+)\s+\\?([0-9a-f]{64})\b", stdout)
    return (int(found[1]), found[2]) if found else None


def removing(path: str) -> str:
    return f"rm -f {shlex.quote(path)}"


def free_bytes(stdout: str) -> int | None:
    """Free bytes from `df -Pk FOLDER`; None when the form is not known."""
    lines = stdout.strip().splitlines()
    found = re.search(r"\s(\d+)\s+\d+%\s", lines[-1] + " ") if lines else None
    return int(found[1]) * 1024 if found else None
