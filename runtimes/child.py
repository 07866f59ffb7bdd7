"""A child process that opens files before this one does: a runtime may abort the process on a bad file.

One child serves all files, so that its start (the import of the runtime) is paid once; it ends when its
standard input closes. A request is a line of JSON, the answer an empty line: what matters is whether the
child lives, for an error that the runtime raises is raised here as well.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

from edgecomp.errors import ArtifactError


@dataclass
class Opener:
    """`script`: Python that reads requests from stdin and prints an empty line after each."""

    script: str
    runtime: str
    timeout_s: float = 600.0
    _process: subprocess.Popen[str] | None = field(default=None, init=False)
    _owner: int = field(default=0, init=False)
    _known: set[str] = field(default_factory=set, init=False)

    def check(self, path: str, **request: Any) -> None:
        """Open a file in the child, once for each request about it.

        Raises ArtifactError when the child dies of it or takes too long.
        """
        line = json.dumps({"path": path, **request}, sort_keys=True)
        if line not in self._known:
            if not self._ask(path, line):
                raise ArtifactError(
                    f"{path} makes {self.runtime} {self._end()}; it is damaged, or needs more memory than "
                    "there is: export it again"
                )
            self._known.add(line)

    def _ask(self, path: str, line: str) -> bool:
        """Did the child live through it?"""
        process = self._started()
        if process.stdin is None or process.stdout is None:
            return False
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line + "\n")
            process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], self.timeout_s)
        if not ready:
            self.close()
            raise ArtifactError(
                f"{path} was not open after {self.timeout_s:g} s with {self.runtime}; try a smaller model"
            )
        return process.stdout.readline() != ""

    def _started(self) -> subprocess.Popen[str]:
        if self._owner != os.getpid():  # a forked process has its parent's child, and wants its own
            self._process, self._owner = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-c", self.script],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            atexit.register(self.close)
        return self._process

    def _end(self) -> str:
        """How the child ended, in words."""
        code = 0 if self._process is None else self._process.wait(timeout=60)
        self.close()
        return f"abort ({signal.Signals(-code).name})" if code < 0 else f"end its process (exit code {code})"

    def close(self) -> None:
        """End the child, if there is one."""
        process, self._process = self._process, None
        atexit.unregister(self.close)
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        process.wait()
