"""From candidates to artifacts: check, export, golden samples, parity, profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgecomp import golden, manifest, progress, registry
from edgecomp.compress.ptq import Quantize
from edgecomp.errors import DataError, ModelError, UnsupportedOpError
from edgecomp.parity import compare
from edgecomp.parity.metric import Metric
from edgecomp.pipeline_steps import runner
from edgecomp.recipe import ProfileEntry, with_settings
from edgecomp.reference import TorchReference
from edgecomp.spec import Artifact, Candidate, Data, DataSource, Exporter, Problem

_SUFFIX = {"tflite": ".tflite", "onnx": ".onnx", "coreml": ".mlpackage", "tensorrt": ".engine"}
_NEEDS_PLAN = "quantize"


@dataclass(frozen=True)
class Candidates:
    """What exports start from: the last float candidate, and the quantized one if a step made it."""

    floating: Candidate
    quantized: Candidate | None = None

    def after(self, candidate: Candidate) -> Candidates:
        if candidate.quantization is None:
            return Candidates(candidate, None)
        return replace(self, quantized=candidate)

    @property
    def with_weights(self) -> Candidate:
        """The candidate whose weights alone were decided (`quantize-weights`), else the float one."""
        found = self.quantized
        if found is None or found.quantization is None or found.quantization.activations:
            return self.floating
        return found

    @property
    def last(self) -> Candidate:
        return self.quantized or self.floating


@dataclass(frozen=True)
class Wanted:
    """One target, its exporter, and whether it lowers a quantization plan."""

    target: str
    exporter: Exporter
    quantized: bool

    def candidate(self, candidates: Candidates) -> Candidate:
        if not self.quantized:
            return candidates.with_weights if self.target.endswith("-int4") else candidates.floating
        if candidates.quantized is None:
            raise ModelError(
                f"target {self.target!r} needs a quantized candidate, and no step quantizes; put a "
                "`quantize` step last, or export with --calib"
            )
        return candidates.quantized


def make_exporter(target: str, settings: Mapping[str, Any]) -> Exporter:
    """The exporter of a target. Raises UnknownNameError, MissingError, RecipeError."""
    factory = registry.load("exporters", target)
    result: Exporter = with_settings(factory, settings, f"target {target!r}", target=target)
    return result


def wanted(target: str, exporter: Exporter, candidate: Candidate) -> Wanted:
    """Ask the exporter about the float candidate: does it need a plan, can it express every op?

    Raises UnsupportedOpError that names each operation and its module.
    """
    found = exporter.problems(candidate)
    quantized = any(p.op == _NEEDS_PLAN for p in found)
    if found and not quantized:
        raise UnsupportedOpError(unsupported(target, found))
    return Wanted(target, exporter, quantized)


def check_quantized(each: Wanted, candidate: Candidate) -> None:
    """The same for a target that lowers a plan. Raises UnsupportedOpError."""
    found = each.exporter.problems(candidate) if each.quantized else []
    if found:
        raise UnsupportedOpError(unsupported(each.target, found))


def unsupported(target: str, problems: Sequence[Problem]) -> str:
    """One paragraph on what a target cannot express."""
    shown = "; ".join(
        f"{p.op} in {p.module or 'the model'}: {p.reason}" if p.op != _NEEDS_PLAN else p.reason
        for p in problems[:5]
    )
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return f"target {target!r} cannot express the model: {shown}{more}; change these parts, or the target"


def rough_quantized(candidate: Candidate, data: Data, bits: int = 8) -> Candidate:
    """A candidate with a plan from a handful of samples: good for asking exporters, for nothing else."""
    if data.calibration is None and data.train is None:
        raise DataError("a target needs calibration data: give data.calibration in the recipe, or --calib")
    return Quantize(observer="minmax", samples=4, rounding="nearest", activation_bits=bits)(candidate, data)


def bits_for(target: str) -> int:
    return 16 if target.endswith("int16x8") else 8


def path_for(out: Path, target: str, exporter: Exporter) -> Path:
    """`out/tflite-int8.tflite`; a third-party exporter may say its own `suffix`."""
    form = registry.format_of(target)
    suffix = getattr(exporter, "suffix", None) or _SUFFIX.get(form, f".{form}")
    return out / f"{target}{suffix}"


def export(
    each: Wanted,
    candidates: Candidates,
    data: Data,
    out: Path,
    *,
    recipe_sha256: str | None = None,
) -> Artifact:
    """Write one artifact with its golden samples and manifest; the file appears when it is complete."""
    candidate = each.candidate(candidates)
    path = path_for(out, each.target, each.exporter)
    progress.note(f"exporting {each.target}")
    for stale in (manifest.path_of(path), golden.path_of(path)):
        stale.unlink(missing_ok=True)  # of an earlier run: it would belie the new file
    artifact = each.exporter.export(candidate, data, path)
    artifact = replace(artifact, recipe_sha256=recipe_sha256)
    manifest.write(artifact)
    source = data.evaluation or data.calibration or data.train
    if source is not None and has_runtime(path):
        artifact = golden.record(artifact, source, TorchReference(reference_of(candidates)))
    manifest.write(artifact)
    return artifact


def reference_of(candidates: Candidates) -> Any:
    """The float model that artifacts are compared with: the chain's original."""
    original = candidates.floating.original
    return candidates.floating.module if original is None else original


def has_runtime(path: Path) -> bool:
    return registry.format_of(path.suffix) in registry.names("runtimes")


def parity(
    artifact: Artifact,
    candidates: Candidates,
    source: DataSource,
    metric: Metric | None,
    gates: Sequence[str],
    layers: Callable[[], list[dict[str, Any]]] | None = None,
) -> dict[str, Any] | None:
    """The parity entry of one artifact, or None where no runtime opens it."""
    if not has_runtime(artifact.path):
        progress.note(f"parity of {artifact.path.name} not checked: no runtime opens {artifact.path.suffix}")
        return None
    progress.note(f"comparing {artifact.path.name} with the float model")
    reference = runner(Candidate(reference_of(candidates), candidates.floating.inputs), source)
    entry = compare(reference, artifact.path, source, metric=metric, gates=gates)
    return {**entry, "layers": layers() if layers else []}


def open_devices(names: Sequence[str], inventory: Path | None = None) -> list[Any]:
    """Devices by name: `local` is this machine, others stand in the inventory (None: the user's).

    Raises UnknownNameError.
    """
    found = []
    for name in names:
        if name == "local":
            found.append(registry.load("devices", "local")())
        else:
            found.append(registry.load("profiling", "inventory").read(inventory).open(name))
    return found


def profiles(path: Path, devices: Sequence[Any], entry: ProfileEntry) -> list[dict[str, Any]]:
    """Profile one artifact on each device, one after another."""
    profile = registry.load("profiling", "profile")
    how = registry.load("profiling", "settings")(
        threads=entry.threads, runs=entry.runs, seconds=entry.seconds, warmup_seconds=entry.warmup_seconds
    )
    found = []
    for device in devices:
        progress.note(f"profiling {path.name} on {device.name}")
        found.append(profile(device, path, how))
    return found
