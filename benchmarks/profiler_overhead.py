"""Does the profiler cost anything? Its timed run against a bare loop on the same session, interleaved.

    python benchmarks/profiler_overhead.py ARTIFACT [--runs 400] [--threads 1]

Both use one session in this process: `edgecomp.devices.agent.timed`, and `invoke` or `run` with the outputs
read, written out by hand. They take turns run by run, and who goes first changes. Prints both medians,
their ratio with its 95 % interval, and the median of the ratios of neighbouring runs (which a busy machine
disturbs less), as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgecomp.devices import agent
from edgecomp.numerics import statistics


def bare_run(model: Any) -> Callable[[], Any]:
    """What a user would write around the same session, with nothing of ours in between."""
    if isinstance(model, agent.OnnxRuntime):
        session, fed = model.session, model.fed
        return lambda: session.run(None, fed)
    interpreter = model.interpreter
    outputs = [detail["index"] for detail in interpreter.get_output_details()]

    def run() -> None:
        interpreter.invoke()
        for index in outputs:
            interpreter.get_tensor(index)

    return run


def milliseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    settings = agent.arguments(["profile", str(options.artifact), "--threads", str(options.threads)])
    model = agent.open_model(settings, settings.model)
    agent.loaded(model, settings.model)
    model.feed(agent.arrays_for(model.inputs(), None))
    bare = bare_run(model)
    agent.warm_up([model], 5)
    ours: list[float] = []
    theirs: list[float] = []
    gc.disable()
    for index in range(options.runs):
        if index % 2:
            ours.append(agent.timed(model))
        theirs.append(milliseconds(bare))
        if index % 2 == 0:
            ours.append(agent.timed(model))
    result = statistics.compare_medians(theirs, ours)
    pairs = [mine / bare for mine, bare in zip(ours, theirs, strict=True)]
    pair_interval = statistics.median_interval(pairs)
    facts = {
        "artifact": str(options.artifact),
        "runtime": f"{model.name} {model.version}",
        "runs_each": len(ours),
        "bare_median_ms": statistics.percentile(theirs, 50),
        "profiler_median_ms": statistics.percentile(ours, 50),
        "difference_us": 1000 * (statistics.percentile(ours, 50) - statistics.percentile(theirs, 50)),
        "ratio": result.ratio,
        "ci95": [result.interval.low, result.interval.high],
        "median_of_pair_ratios": statistics.percentile(pairs, 50),
        "pair_ci95": [pair_interval.low, pair_interval.high],
        "within_2_percent": abs(statistics.percentile(pairs, 50) - 1) <= 0.02,
    }
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
