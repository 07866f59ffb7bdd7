"""The same artifact on several processors: do they give the same integers?

Integer kernels may round differently between processors, by a step or two of the output's scale. On x86
without VNNI they may also saturate: the 8-bit multiply-add of AVX2 (`vpmaddubsw`) adds two products in 16
bits, where 255 * 127 * 2 does not fit. Outputs are then wrong, not rounded, and the same file is right on
Arm. It is told by comparing a device's kernels with the graph as written on that same device.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from edgecomp import files
from edgecomp.devices import host
from edgecomp.devices.local import LocalDevice
from edgecomp.devices.profiler import checked
from edgecomp.devices.qemu import QemuX86Device
from edgecomp.devices.transport import Transport
from edgecomp.errors import DataError, InputError

# Steps that kernels of one file were seen to differ by on deep networks. Twice that is no rounding; nor is
# more than it where another processor is four times as near on the same file.
ROUNDING_STEPS = 10
SATURATED_STEPS = 2 * ROUNDING_STEPS
TIMES_THE_LEAST = 4

Outputs = Mapping[str, np.ndarray]


@runtime_checkable
class ShowsProcessors(Protocol):
    """A device that emulates, and can be any of several processors."""

    def processors(self) -> Sequence[Transport]: ...


def with_host(devices: Sequence[Transport]) -> list[Transport]:
    """This machine first, then each device, an emulated one once for each of its processors.

    An old x86 (Haswell: AVX2 without VNNI) joins where emulated devices are compared and qemu-x86_64 is here.
    """
    found: list[Transport] = [LocalDevice()]
    for device in devices:
        several = list(device.processors()) if isinstance(device, ShowsProcessors) else [device]
        found += [d for d in several if d.kind != LocalDevice.kind]
    emulates = any(isinstance(d, ShowsProcessors) and list(d.processors()) != [d] for d in devices)
    if emulates and shutil.which("qemu-x86_64"):
        found.append(QemuX86Device("x86-without-vnni"))
    return found


def run(
    device: Transport, artifact: Path, inputs: Path, *, reference: bool = False, timeout_s: float = 1800
) -> dict[str, np.ndarray]:
    """Outputs [N, ...] by name of every sample in an .npz. `reference`: the graph as written, no fusion.

    Raises a branch of DeviceError, DataError for inputs that do not fit.
    """
    model, given = device.stage(artifact), device.stage(inputs)
    result = f"{given}.{files.sha256(artifact)[:12]}.{device.name}{'.reference' if reference else ''}.npz"
    words = ["infer", model, "--inputs", given, "--outputs", result]
    words += ["--reference"] if reference else []
    events, done = host.call_agent(device, words, threads=1, timeout_s=timeout_s)
    host.check(device, artifact, events, done)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "outputs.npz"
        device.pull(result, local)
        with np.load(local, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}


def step_of(outputs: Sequence[np.ndarray]) -> float:
    """The scale of an output: 1 for integers; for dequantized floats the smallest gap between two values.

    0.0, 0.5, 0.5, 2.0 -> 0.5. One value alone tells no gap: 1.
    """
    if all(np.issubdtype(array.dtype, np.integer) for array in outputs):
        return 1.0
    values = np.unique(np.concatenate([array.reshape(-1).astype(np.float64) for array in outputs]))
    gaps = np.diff(values)
    gaps = gaps[gaps > 1e-9 * max(1.0, float(np.abs(values).max()))]
    return float(gaps.min()) if gaps.size else 1.0


def agreement(ours: Outputs, theirs: Outputs) -> dict[str, Any]:
    """Share of equal values, largest difference in steps, and samples whose top-1 changed.

    Both hold the same names and shapes [N, ...]. Raises DataError when they do not.
    """
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        raise DataError("two devices gave outputs of different names or shapes; is it the same artifact?")
    equal, total, largest, flips = 0, 0, 0.0, 0
    for name, mine in ours.items():
        other = theirs[name]
        steps = np.abs(mine.astype(np.float64) - other.astype(np.float64)) / step_of([mine, other])
        equal += int(np.sum(np.rint(steps) == 0))
        total += steps.size
        largest = max(largest, float(np.rint(steps).max()))
        flips += _flips(mine, other)
    return {"equal_share": equal / total, "largest_step": int(largest), "top1_flips": flips}


def _flips(mine: np.ndarray, other: np.ndarray) -> int:
    """Samples whose largest value stands elsewhere; 0 where an output has a single value."""
    if mine.ndim < 2 or mine.shape[-1] < 2:
        return 0
    return int(np.sum(mine.argmax(-1) != other.argmax(-1)))


def check_with_host(devices: Sequence[Transport], artifact: Path, inputs: Path) -> dict[str, Any]:
    """`check` of this machine against the devices: see `with_host`. What was opened for it is closed."""
    everyone = with_host(devices)
    try:
        return check(everyone, artifact, inputs)
    finally:
        for device in everyone:
            if device not in devices:
                device.close()


def check(devices: Sequence[Transport], artifact: Path, inputs: Path) -> dict[str, Any]:
    """Run an artifact on each device; compare all with the first, and each with its own reference kernels.

    Returns `artifact`, `samples`, `reference` (the first device), `rows`, `warnings`, and over all devices
    the least `equal_share`, and the most `largest_step`, `top1_flips` and `saturates` (0 or 1). A row holds
    `device`, `isa`, `equal_share`, `largest_step`, `top1_flips`, `reference_step` (largest difference to the
    graph as written on the same device, in steps) and `saturates`.
    """
    if not devices:
        raise InputError("no device is named; give at least two with --device")
    checked(artifact)
    rows, outputs = [], []
    for device in devices:
        facts = device.probe()
        found = run(device, artifact, inputs)
        outputs.append(found)
        plain = agreement(run(device, artifact, inputs, reference=True), found)["largest_step"]
        rows.append(
            {
                "device": device.name,
                "isa": "+".join([str(facts["isa"]), *facts["isa_features"]]),
                "soc": facts["soc"],
                **agreement(outputs[0], found),
                "reference_step": plain,
                "x86": str(facts["isa"]) == "x86_64",
            }
        )
    rows = judged(rows)
    return {
        "artifact": artifact.name,
        "samples": len(next(iter(outputs[0].values()))),
        "reference": devices[0].name,
        "equal_share": min(row["equal_share"] for row in rows),
        "largest_step": max(row["largest_step"] for row in rows),
        "top1_flips": max(row["top1_flips"] for row in rows),
        "saturates": int(any(row["saturates"] for row in rows)),
        "rows": rows,
        "warnings": [_warning(row) for row in rows if far_off(row, rows)],
    }


def judged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with `saturates` in the place of `x86`: an x86 whose kernels are far off the graph as written."""
    found = [{**row, "saturates": bool(row["x86"]) and far_off(row, rows)} for row in rows]
    return [{key: value for key, value in row.items() if key != "x86"} for row in found]


def far_off(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Is a device further from the graph as written than rounding explains?"""
    steps, least = row["reference_step"], min(r["reference_step"] for r in rows)
    return bool(steps > SATURATED_STEPS or (steps > ROUNDING_STEPS and steps >= TIMES_THE_LEAST * least))


def _warning(row: Mapping[str, Any]) -> str:
    told = (
        f"on {row['device']} ({row['isa']}) the integer kernels differ by {row['reference_step']} steps from "
        "the graph as written there"
    )
    if row["saturates"]:
        return (
            f"saturates: {told}; its 8-bit multiply-add overflows 16 bits. Judge this file on Arm or on x86 "
            "with VNNI, or export it with 7-bit weights for such processors"
        )
    return (
        f"wrong kernels: {told}; the runtime's kernels for this processor are at fault, or its emulation is: "
        "do not judge the file there"
    )
