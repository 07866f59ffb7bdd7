"""An artifact's outputs from a device, for parity: inputs go there as an .npz, outputs come back as one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp import door, registry
from edgecomp.errors import DataError, DeviceError
from edgecomp.golden import save
from edgecomp.spec import DataSource, Session

TIMEOUT_S = 600.0
# Samples of a comparison between processors; an emulated one needs seconds for each.
SAMPLES = 16


class OnDevice:
    """Calls an artifact on a device as `edgecomp.parity` calls a model: float arrays in, float arrays out.

    `session`: the artifact opened here, for its inputs' and outputs' dtype, layout and scale. The number of
    samples must divide by the artifact's batch. Raises DeviceError when the device refuses or is lost.
    """

    def __init__(self, device: Any, artifact: Path, session: Session) -> None:
        self._device, self._artifact, self._session = device, artifact, session
        self._agent = device.stage(registry.load("profiling", "agent"))
        self._staged = device.stage(artifact)

    def __call__(self, inputs: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        with tempfile.TemporaryDirectory() as folder:
            sent, received = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
            with sent.open("wb") as stream:
                save(stream, stored(inputs, self._session))
            there = self._device.stage(sent)
            result = f"{there}.outputs.npz"
            words = [*self._device.python(), self._agent, "infer", self._staged]
            done = self._device.run([*words, "--inputs", there, "--outputs", result], TIMEOUT_S)
            if done.exit_code != 0:
                raise DeviceError(
                    f"device {self._device.name!r} did not run {self._artifact.name} (exit code "
                    f"{done.exit_code}): {reason(done.stdout, done.stderr)}"
                )
            self._device.pull(result, received)
            with np.load(received, allow_pickle=False) as archive:
                raw = [archive[name] for name in archive.files]
        return [door.out_of(a, s) for a, s in zip(raw, self._session.outputs, strict=True)]


def stored(inputs: Sequence[np.ndarray], session: Session) -> dict[str, np.ndarray]:
    """Every input as the artifact stores it, [N, ...], in the order of its inputs."""
    size = session.inputs[0].shape[0]
    found = {}
    for i, (array, spec) in enumerate(zip(inputs, session.inputs, strict=True)):
        slices = [door.into(array[at : at + size], spec) for at in range(0, len(array), size)]
        found[f"input_{i}"] = np.concatenate(slices)
    return found


def across(
    devices: Sequence[Any], artifact: Path, source: DataSource, *, samples: int = SAMPLES
) -> dict[str, Any]:
    """The artifact on this machine and on each device, over the first samples: do all give the same integers?

    Keys as in `edgecomp.devices.cross_isa.check`. An emulated device is run once for each of its processors.
    Raises DataError when the data has fewer samples than the artifact's batch, and a branch of DeviceError.
    """
    runtime = registry.load("runtimes", registry.format_of(artifact.suffix))()
    session: Session = runtime.open(artifact)
    size = session.inputs[0].shape[0]
    batch = next(iter(source.batches(max(size, samples - samples % size))))
    count = len(batch) - len(batch) % size
    if count == 0:
        raise DataError(f"the data has {len(batch)} samples; {artifact.name} takes {size} at once")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.npz"
        with path.open("wb") as stream:
            save(stream, stored([a[:count] for a in batch.inputs], session))
        found: dict[str, Any] = registry.load("profiling", "agreement-with-host")(devices, artifact, path)
    return found


def reason(stdout: str, stderr: str) -> str:
    """What the agent said: the message of its last event, else the end of stderr."""
    for line in reversed(stdout.splitlines()):
        try:
            message = json.loads(line).get("message")
        except (ValueError, AttributeError):
            continue
        if message:
            return str(message)
    return " ".join(stderr.split()[-40:]) or "no message"
