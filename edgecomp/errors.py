"""Every error that edgecomp raises on purpose, with the exit code of its branch.

    EdgecompError
    ├── GateFailed                 1   a gate did not hold
    ├── InputError                 2   wrong usage or bad input
    │   ├── UnknownNameError           a target, step, key or device that nobody registered
    │   ├── DataError                  missing, empty, undecodable or non-finite data
    │   ├── ModelError                 a model or checkpoint that cannot be used
    │   │   └── UnsupportedOpError     ops that a target cannot express
    │   ├── RecipeError                a recipe that does not hold together
    │   ├── ArtifactError              an artifact that is damaged or not what it says
    │   └── OutputError                an output folder that cannot be written
    ├── MissingError               3   an extra, a library or a tool is not on this machine
    └── DeviceError                4   a device failed or was lost (branches in edgecomp.devices)

A message is one paragraph: the thing, its value, what was expected, and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgecompError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 2


class GateFailed(EdgecompError):
    """A gate was evaluated and did not hold."""

    exit_code = 1


class InputError(EdgecompError):
    """The command, a file or a value given by the user cannot be used."""


class DataError(InputError):
    """Data is missing, empty, does not decode, has the wrong shape, or holds NaN or Inf."""


class ModelError(InputError):
    """A model or checkpoint cannot be loaded, captured or used."""


class UnsupportedOpError(ModelError):
    """A target cannot express some operations of the model."""


class RecipeError(InputError):
    """A recipe has an unknown key, a wrong value, or steps that do not fit together."""


class ArtifactError(InputError):
    """An artifact is damaged, or is not what its name or manifest says."""


class OutputError(InputError):
    """The output folder cannot be written: missing rights, no space, or not a folder."""


class UnknownNameError(InputError):
    """A name that nobody registered; the message offers the nearest known one."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        choices = sorted(known)
        close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(choices) or 'none'}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class MissingError(EdgecompError):
    """A library, an extra or a tool is not installed on this machine."""

    exit_code = 3


class DeviceError(EdgecompError):
    """A device could not be reached, refused the work, or was lost."""

    exit_code = 4
