"""A first recipe for a model: which steps its data allows, which targets can express it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from edgecomp import files, pipeline_steps, recipe
from edgecomp import pipeline_export as exporting
from edgecomp.errors import InputError, MissingError, UnsupportedOpError
from edgecomp.pipeline_single import Model, Sources, read_preprocessing
from edgecomp.spec import Batch, Candidate, Data

TARGETS = ("tflite-int8", "onnx-qdq", "coreml-pal4")


@dataclass(frozen=True)
class Choice:
    """A target, and why it was left out (empty: it was taken)."""

    target: str
    reason: str = ""


def write(
    model: Model, sources: Sources, out: Path, *, targets: Sequence[str] = TARGETS, force: bool = False
) -> dict[str, Any]:
    """Look at the model and its data, and write a recipe that `edgecomp run` takes as it is.

    Returns `recipe` (path), `inputs`, `params`, `macs`, `steps`, `targets[]` (`target`, `reason` or null).
    Raises InputError when `out` exists and `force` is not given, or no evaluation data is there, and what
    loading the model and the data raises.
    """
    if out.exists() and not force:
        raise InputError(f"{out} exists already; give another --out, or --force to write over it")
    if sources.evaluation is None:
        raise InputError("a recipe needs evaluation data to judge every step by; give --data SRC")
    files.check_writable(out.parent)
    data = sources.open()
    candidate, _ = model.load(data)
    choices = [choose(target, candidate, sources) for target in dict.fromkeys(targets)]
    counted = pipeline_steps.count(candidate)
    has_targets = any(b.targets is not None for b in islice(_samples(data), 1))
    text = compose(model, sources, candidate, counted, choices, has_targets)
    with files.atomic(out) as temporary:
        temporary.write_text(text)
        document = recipe.read(temporary)
    return {
        "recipe": str(out),
        "inputs": [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in candidate.inputs],
        "params": counted["params"],
        "macs": counted["macs"],
        "steps": [step.name for step in document.recipe.steps],
        "targets": [{"target": c.target, "reason": c.reason or None} for c in choices],
    }


def _samples(data: Data) -> Iterator[Batch]:
    return iter(()) if data.evaluation is None else data.evaluation.batches(1)


def choose(target: str, candidate: Candidate, sources: Sources) -> Choice:
    """Ask the target's exporter. Raises UnknownNameError for a target that nobody registered."""
    try:
        asked = exporting.wanted(target, exporting.make_exporter(target, {}), candidate)
    except (MissingError, UnsupportedOpError) as error:
        return Choice(target, str(error))
    if asked.quantized and not _can_quantize(sources):
        return Choice(target, "its scales need calibration data: give --calib SRC")
    return Choice(target)


def _can_quantize(sources: Sources) -> bool:
    return bool(sources.calibration or sources.train)


def compose(
    model: Model,
    sources: Sources,
    candidate: Candidate,
    counted: dict[str, Any],
    choices: Sequence[Choice],
    has_targets: bool,
) -> str:
    """The recipe's text, with a comment on every choice."""
    macs = "not counted" if counted["macs"] is None else f"{counted['macs']:,}"
    shapes = ", ".join(f"{s.name} {'x'.join(map(str, s.shape))}" for s in candidate.inputs)
    lines = [
        "# Written by `edgecomp init`; run it with `edgecomp run`. Every key is checked before any work.",
        f"# {counted['params']:,} parameters, multiply-accumulates {macs}; inputs: {shapes}.",
        f"model: {_word(model.spec)}",
    ]
    if model.weights:
        lines.append(f"weights: {_word(str(model.weights))}")
    lines += ["", *_data(sources), "", *_steps(sources), "", *_exports(choices), "", *_gates(has_targets)]
    return "\n".join(lines) + "\n"


def _word(text: str) -> str:
    """A string as YAML writes it, quoted where it must be."""
    return yaml.safe_dump(text, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def _data(sources: Sources) -> list[str]:
    decided = ""
    if sources.preprocessing:
        facts = read_preprocessing(sources.preprocessing).to_json()
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items() if v is not None}
        decided = yaml.safe_dump(plain, default_flow_style=True, width=10_000).strip()
    lines = ["data:"]
    for role, spec in (("train", sources.train), ("calibration", sources.calibration)):
        lines += _role(role, spec, decided) if spec else [f"  # {role}: SRC    # not given"]
    return [*lines, *_role("evaluation", str(sources.evaluation), decided)]


def _role(role: str, spec: str, decided: str) -> list[str]:
    if not decided:
        return [f"  {role}: {_word(spec)}"]
    return [f"  {role}:", f"    source: {_word(spec)}", f"    preprocessing: {decided}"]


_TRAINED = (
    "- prune: {macs: 0.6}    # channels go until 60 % of the multiply-accumulates remain",
    "- distill: {epochs: 5}    # the float model teaches what is left",
    '  gates: ["drop <= 0.02"]',
)
_QUANTIZED = "- quantize: {samples: 256}    # scales for every integer target, chosen once"


def _steps(sources: Sources) -> list[str]:
    """Steps that the data allows; the others as comments."""
    lines = ["# The model is evaluated after every step; `drop` is what was lost against the float model."]
    lines.append("steps:" if _can_quantize(sources) else "steps: []")
    if sources.train:
        lines += [f"  {line}" for line in _TRAINED]
    else:
        lines += ["  # with data.train:", *(f"  # {line}" for line in _TRAINED)]
    if _can_quantize(sources):
        return [*lines, f"  {_QUANTIZED}"]
    return [*lines, "  # with data.calibration, a hundred typical samples or more:", f"  # {_QUANTIZED}"]


def _exports(choices: Sequence[Choice]) -> list[str]:
    taken = [f"  - {c.target}" for c in choices if not c.reason]
    left = [f"  # - {c.target}: {' '.join(c.reason.split())}" for c in choices if c.reason]
    return ["exports:" if taken else "exports: []", *taken, *left]


def _gates(has_targets: bool) -> list[str]:
    gate = '"metric.delta >= -0.03"' if has_targets else '"sqnr_db > 10"'
    return [
        "# Conditions on every artifact; `edgecomp run` ends with exit code 1 when one does not hold.",
        f"gates: [{gate}]",
        "",
        "profile: {devices: [local]}",
    ]
