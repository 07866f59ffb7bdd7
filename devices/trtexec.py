"""NVIDIA's trtexec: its arguments, its text and JSON in the forms of TensorRT 7 to 10.

Text: `Latency: min = .. ms, max = .., mean = .., median = .., percentile(90%) = ..` (newer), the same with
`percentile(99%)` only, and `min: .. ms (end to end .. ms)`, `percentile: .. ms at 99% (end to end ..)` (7).
JSON: `--exportTimes` a list of objects with `computeMs`, `latencyMs` ..., warm-ups included;
`--exportProfile` first `{"count": N}`, then a layer each; `--exportLayerInfo` the layers of the engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgecomp.devices.faults import OutputFormError
from edgecomp.devices.host import Request

PASSED = "&&&& PASSED TensorRT.trtexec"
_VERSION = re.compile(r"TensorRT\.trtexec \[TensorRT v(\d+)\]|TensorRT version: ([\d.]+)")
_NEW_LATENCY = re.compile(r"\bLatency: (min = .*)$", re.M)
_OLD_LATENCY = re.compile(r"\b(min|max|mean|median|percentile): ([\d.]+) ms(?: at (\d+)%)?")


def building(onnx: str, engine: str, *, old: bool) -> list[str]:
    """Build an INT8 engine from a QDQ file: its scales are in the file. `old`: before TensorRT 8.6."""
    last = "--buildOnly" if old else "--skipInference"
    return [f"--onnx={onnx}", f"--saveEngine={engine}", "--int8", "--fp16", last]


def timing(engine: str, folder: str, request: Request) -> list[str]:
    """Run an engine; three JSON files are left in `folder`."""
    return [
        f"--loadEngine={engine}",
        f"--warmUp={int(request.warmup_seconds * 1000)}",
        f"--duration={max(1, round(request.seconds))}",
        f"--iterations={request.runs}",
        "--useSpinWait",
        "--percentile=90,95,99",
        f"--exportTimes={folder}/times.json",
        f"--exportProfile={folder}/profile.json",
        f"--exportLayerInfo={folder}/layers.json",
        "--separateProfileRun",
    ]


def version(text: str) -> str | None:
    """`[TensorRT v8502]` -> 8.5.2; `[TensorRT v100300]` -> 10.3.0."""
    found = _VERSION.search(text)
    if not found:
        return None
    if found[2]:
        return found[2]
    digits = found[1]
    if len(digits) <= 4:
        return f"{digits[0]}.{int(digits[1])}.{int(digits[2:]) // 10 or int(digits[2:])}"
    return f"{int(digits[:-4])}.{int(digits[-4:-2])}.{int(digits[-2:])}"


def passed(text: str) -> bool:
    return PASSED in text


def latency(text: str) -> dict[str, float]:
    """Milliseconds of the `Latency` line (transfers included). Raises OutputFormError when there is none."""
    lines = _NEW_LATENCY.findall(text)
    if lines:
        pairs = re.findall(r"(min|max|mean|median|percentile\((\d+)%\)) = ([\d.]+) ms", lines[-1])
        return {_name(word, share): float(value) for word, share, value in pairs}
    pairs = _OLD_LATENCY.findall(text)
    if not pairs:
        raise OutputFormError("trtexec", text)
    found: dict[str, float] = {}
    for word, value, share in pairs:
        found.setdefault(_name(word, share), float(value))
    return found


def _name(word: str, share: str) -> str:
    if share:
        return f"p{share}"
    return "p50" if word == "median" else word


def samples(text: str, warmup_ms: float) -> tuple[float, ...]:
    """Host latencies in ms from `--exportTimes`, without those that started within the warm-up.

    Raises OutputFormError when the JSON has another form.
    """
    rows = _json_list(text, "trtexec --exportTimes")
    try:
        start = min(float(row["startEnqMs"]) for row in rows)
        kept = [row for row in rows if float(row["startEnqMs"]) - start >= warmup_ms] or rows
        return tuple(float(row["latencyMs"]) for row in kept)
    except (KeyError, TypeError, ValueError) as error:
        raise OutputFormError("trtexec --exportTimes", text) from error


def layers(profile_text: str, layers_text: str | None = None) -> list[dict[str, Any]]:
    """Layers with milliseconds (the median where it is told, else the average) and their precision."""
    rows = _json_list(profile_text, "trtexec --exportProfile")
    kinds = _layer_types(layers_text) if layers_text else {}
    found = []
    for row in rows:
        if "name" not in row:
            continue
        milliseconds = row.get("medianMs", row.get("averageMs"))
        found.append(
            {
                "name": row["name"],
                "type": kinds.get(row["name"], ""),
                "ms": float(milliseconds) if milliseconds is not None else None,
                "placed_on": "tensorrt",
            }
        )
    return found


def _layer_types(text: str) -> dict[str, str]:
    """Type of each layer and the format of its first output; an engine without detail has names only."""
    try:
        facts = json.loads(text)
    except ValueError as error:
        raise OutputFormError("trtexec --exportLayerInfo", text) from error
    rows = facts.get("Layers", []) if isinstance(facts, Mapping) else []
    return {str(row["Name"]): _described(row) for row in rows if isinstance(row, Mapping) and "Name" in row}


def _described(row: Mapping[str, Any]) -> str:
    outputs = row.get("Outputs") or []
    form = outputs[0].get("Format/Datatype", "") if outputs and isinstance(outputs[0], Mapping) else ""
    return " ".join(str(word) for word in (row.get("LayerType", ""), form) if word)


def _json_list(text: str, what: str) -> Sequence[Mapping[str, Any]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise OutputFormError(what, text) from error
    if not isinstance(rows, list) or not rows:
        raise OutputFormError(what, text)
    return rows
