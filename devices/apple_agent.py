"""Runs on a Mac: times an .mlpackage there or on an attached iPhone with coremltools' own benchmarker.

    python3 apple_agent.py MODEL.mlpackage --target mac|iphone|ipad --runs 50 [--units all] [--team TEAM]

Prints the same JSON lines as agent.py. The package is compiled where it runs; times are Core ML's own (the
call of predict on the device, no transfer). Per-op times are estimates: the prediction's time shared out by
the compute plan's cost, as coremltools gives them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import coremltools
from coremltools.models.ml_program.experimental import perf_utils, remote_device

UNITS = {"all": "ALL", "auto": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ane": "CPU_AND_NE"}
PLACES = {"MLCPUComputeDevice": "cpu", "MLGPUComputeDevice": "gpu", "MLNeuralEngineComputeDevice": "ane"}


def emit(event: str, **facts: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


def found_device(target: str) -> Any:
    """None for the Mac itself, else the one attached device of that type. Raises LookupError."""
    if target == "mac":
        return None
    kind = remote_device.DeviceType[target.upper()]
    devices = remote_device.Device.get_connected_devices(kind)
    if len(devices) != 1:
        names = ", ".join(device.name for device in devices) or "none"
        raise LookupError(f"expected one attached {target}, found {names}; attach and unlock exactly one")
    return devices[0]


async def measure(benchmark: Any, runs: int, per_op: bool) -> None:
    """Load, first run, warm-up, timed runs, and the share of each operation, as events."""
    load = await benchmark.benchmark_load()
    emit("init", model=0, ms=load.samples[0], accelerator=str(benchmark.compute_units.name).lower())
    first = await benchmark.benchmark_predict(iterations=1)
    emit("first", model=0, ms=first.samples[0])
    timed = await benchmark.benchmark_predict(iterations=runs, warmup=True)
    emit("samples", model=0, ms=list(timed.samples))
    if per_op:
        rows = await benchmark.benchmark_operation_execution(iterations=5, warmup=True)
        emit("ops", ops=[described(row) for row in rows])


def described(row: Any) -> dict[str, Any]:
    """An operation of the benchmarker: estimated milliseconds and the unit that Core ML prefers for it."""
    usage = row.compute_device_usage
    preferred = type(usage.preferred_compute_device).__name__ if usage else ""
    samples = row.measurement.samples if row.measurement else []
    outputs = list(row.spec.outputs)
    return {
        "name": outputs[0].name if outputs else "",
        "type": row.spec.type,
        "ms": statistics.median(samples) if samples else None,
        "placed_on": PLACES.get(preferred, "unknown"),
    }


async def run(options: argparse.Namespace) -> None:
    device = found_device(options.target)
    if device is not None:
        credentials = remote_device.AppSigningCredentials(development_team=options.team)
        device = await device.prepare_for_model_debugging(credentials=credentials)
        emit("target", name=device.name, type=options.target)
    units = getattr(coremltools.ComputeUnit, UNITS[options.units])
    model = coremltools.models.MLModel(options.model, compute_units=units, skip_model_load=device is not None)
    emit("runtime", model=0, name="coreml", version=coremltools.__version__)
    await measure(perf_utils.MLModelBenchmarker(model, device), options.runs, options.op_runs > 0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time an .mlpackage on a Mac or an attached device.")
    parser.add_argument("model")
    parser.add_argument("--target", choices=("mac", "iphone", "ipad"), default="mac")
    parser.add_argument("--units", choices=sorted(UNITS), default="all")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--op-runs", type=int, default=5)
    parser.add_argument("--team", help="Apple development team that signs the runner app (iphone, ipad)")
    options = parser.parse_args(argv)
    emit("start", state={})
    try:
        asyncio.run(run(options))
    except (LookupError, RuntimeError, ValueError) as error:
        emit("error", kind="model", message=str(error))
        return 2
    emit("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
