"""What can go wrong with a device; every branch leaves the command line with exit code 4.

DeviceError
├── UnreachableError       no answer: wrong address, port closed, machine off
├── HostKeyError           the host key is unknown, or is not the one that was accepted before
├── AuthenticationError    the device refuses our key, password or adb authorization
├── OfflineError           adb sees the device, and the device does not answer
├── DroppedError           the connection was lost in the middle of work
├── TookTooLongError       the work took longer than it may, and was ended
├── NoSpaceError           the device's disk is full
├── RuntimeMissingError    the runtime that the artifact needs is not on the device, or is too old
├── ModelCrashError        a signal ended the process that ran the model
├── ModelRefusedError      the runtime on the device cannot load or run the artifact
└── OutputFormError        a tool printed something that we cannot read; the text is kept
"""

from __future__ import annotations

import signal

from edgecomp.errors import DeviceError


class UnreachableError(DeviceError):
    """No answer from the device's address."""


class HostKeyError(DeviceError):
    """The host key is unknown or was changed; nothing was sent to the device."""


class AuthenticationError(DeviceError):
    """The device refused who we are."""


class OfflineError(DeviceError):
    """The device is attached and does not answer."""


class DroppedError(DeviceError):
    """The connection was lost in the middle of work."""


class TookTooLongError(DeviceError):
    """The work took longer than its limit and was ended on the device."""


class NoSpaceError(DeviceError):
    """The device has no room for a file."""


class RuntimeMissingError(DeviceError):
    """The device lacks the runtime that an artifact needs."""


class ModelCrashError(DeviceError):
    """A signal ended the process that ran the model."""

    def __init__(self, device: str, artifact: str, number: int, stderr: str) -> None:
        self.signal = number
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        hint = "out of memory is likely; " if number == signal.SIGKILL else ""
        super().__init__(
            f"{artifact} crashed its runtime on device {device!r} ({name}); {hint}try another runtime with "
            f"--runtime, or none of its accelerators with --accelerator none{last_lines(stderr)}"
        )


class ModelRefusedError(DeviceError):
    """The runtime there cannot load or run an artifact: the device works, the file does not fit it."""

    exit_code = 2


class OutputFormError(DeviceError):
    """A tool on the device printed something in a form that is not known; `text` keeps it whole."""

    def __init__(self, what: str, text: str) -> None:
        self.text = text
        super().__init__(f"{what} printed something that edgecomp cannot read{last_lines(text)}")


def last_lines(text: str, count: int = 10) -> str:
    """The end of a tool's output as a tail for a message; empty when there is none."""
    lines = [line.rstrip() for line in text.strip().splitlines()[-count:]]
    return "; it ended with: " + " | ".join(lines) if lines else ""
