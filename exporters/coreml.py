"""Core ML packages: float16 and float32 programs, palettized and linearly quantized weights."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from edgecomp import files, manifest
from edgecomp.errors import ModelError, UnsupportedOpError
from edgecomp.exporters import (
    coreml_activations,
    coreml_budget,
    coreml_convert,
    coreml_file,
    coreml_functions,
    coreml_importance,
    coreml_place,
)
from edgecomp.exporters.coreml_blob import BlobWriter
from edgecomp.exporters.coreml_compress import Linear, Palettize
from edgecomp.exporters.coreml_groups import Planned
from edgecomp.exporters.coreml_importance import Importance
from edgecomp.exporters.coreml_toolkit import Model_pb2
from edgecomp.exporters.coreml_weights import Replace, rewrite
from edgecomp.spec import Artifact, Batch, Candidate, Data, Problem, StepRecord

_BITS = {"coreml-pal4": 4, "coreml-pal6": 6, "coreml-int8": 8, "coreml-int4": 4}
_AUTO_GROUP = {"coreml-pal4": 1, "coreml-pal6": 8}
"""Output channels that share a palette: one palette of 16 float16 entries is 32 bytes, one of 64 is 128."""
_TARGETS = (*_BITS, "coreml-fp16", "coreml-fp32")
_DEPLOYMENT = ("iOS16", "iOS17", "iOS18", "iOS26")
_MODERN = ("iOS18", "iOS26")
"""Groups of palettes, blocks and states; iOS26 also takes int8 at the door."""


@dataclass(frozen=True)
class CoreMLExporter:
    """Lowers a candidate to an `.mlpackage`.

    `target`: coreml-pal4, coreml-pal6 (palettes), coreml-int8 (per output channel), coreml-int4 (per block),
    coreml-fp16, coreml-fp32. Weights are compressed; activations stay in `compute_precision`, unless
    `activations` is int8 (coreml-int8, from iOS 17 on): then values are rounded on the plan's scales.
    `group_size`: output channels that share a palette (auto: 1 for pal4, 8 for pal6; None: one per tensor).
    `block_size`: inputs that share a scale (int4, where no `quantize-weights` decided before). Where either
    does not divide, the next smaller that does is taken, and noted in the artifact's history.
    `minimum_deployment_target`: palettes of groups and blocks need iOS18; before it one palette per tensor.
    `min_elements`: smaller weights stay float and are listed in the artifact's `skipped`.
    `depthwise`: how pal4 and pal6 store depthwise convolutions (a few weights per channel, of widely
    different range): 8-bit integers per channel, palettes, or float.
    `importance`: palettes minimize squared error weighted by the Fisher information of every weight, measured
    on the first `samples` of the calibration data, or plain squared error (also without such data).
    `palette_dtype`: entries of palettes as float16, or int8 with a scale per palette (half the bytes; iOS18).
    `assignment`: "gptq" puts weights on palettes layer by layer with their inputs in view, on `samples` of
    the calibration data; "nearest" takes the nearest entry; "auto" is gptq where there is such data and the
    model has no operation that it would take apart (normalization, attention, recurrence).
    `size`: the package takes at most this (bytes, or such as "3.2MB"); weights get 4, 6 or 8 bits (pal4).
    `states`: buffers of the module that keep their value from one prediction to the next (a decoder's cache).
    """

    target: str = "coreml-pal4"
    group_size: int | Literal["auto"] | None = "auto"
    block_size: int = 32
    minimum_deployment_target: str = "iOS18"
    compute_precision: Literal["float16", "float32"] | None = None
    min_elements: int = 256
    depthwise: Literal["int8", "palette", "float"] = "int8"
    importance: Literal["fisher", "none"] = "fisher"
    samples: int = 32
    palette_dtype: Literal["float16", "int8"] = "float16"
    assignment: Literal["auto", "gptq", "nearest"] = "auto"
    size: str | int | None = None
    states: tuple[str, ...] = ()
    activations: Literal["float", "int8"] = "float"

    def __post_init__(self) -> None:
        if self.target not in _TARGETS:
            raise ValueError(f"target is {self.target!r}; expected one of {', '.join(_TARGETS)}")
        if self.minimum_deployment_target not in _DEPLOYMENT:
            raise ValueError(
                f"minimum_deployment_target is {self.minimum_deployment_target!r}; "
                f"expected one of {', '.join(_DEPLOYMENT)}"
            )
        if isinstance(self.group_size, str) and self.group_size != "auto":
            raise ValueError(
                f"group_size is {self.group_size!r}; expected a number, auto, or none (per tensor)"
            )
        if isinstance(self.group_size, int) and self.group_size < 1:
            raise ValueError(
                f"group_size is {self.group_size}; expected 1 or more, auto, or none (per tensor)"
            )
        if self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}; expected 1 or more")
        if self.importance not in ("fisher", "none") or self.samples < 1:
            raise ValueError(
                f"importance is {self.importance!r} with {self.samples} samples; "
                "expected fisher or none, and 1 sample or more"
            )
        if self.compute_precision not in (None, "float16", "float32"):
            raise ValueError(f"compute_precision is {self.compute_precision!r}; expected float16 or float32")
        if self.depthwise not in ("int8", "palette", "float"):
            raise ValueError(f"depthwise is {self.depthwise!r}; expected int8, palette or float")
        if self.palette_dtype not in ("float16", "int8"):
            raise ValueError(f"palette_dtype is {self.palette_dtype!r}; expected float16 or int8")
        if self.assignment not in ("auto", "gptq", "nearest"):
            raise ValueError(f"assignment is {self.assignment!r}; expected auto, gptq or nearest")
        if self.size is not None:
            coreml_budget.parse(self.size)
            if self.target != "coreml-pal4" or self.assignment == "nearest":
                raise ValueError(f"size is set; it needs coreml-pal4 and assignment gptq, not {self.target}")
        self._check_activations()
        if self.minimum_deployment_target not in _MODERN:
            self._check_before_ios18()

    def _check_activations(self) -> None:
        if self.activations not in ("float", "int8"):
            raise ValueError(f"activations is {self.activations!r}; expected float or int8")
        if self.activations == "int8" and self.target != "coreml-int8":
            raise ValueError(f"activations is int8; that is coreml-int8's setting, not {self.target}'s")
        if self.activations == "int8" and self.minimum_deployment_target == "iOS16":
            raise ValueError(
                "activations is int8, which needs iOS 17: set minimum_deployment_target to iOS17 or iOS18"
            )

    def _check_before_ios18(self) -> None:
        if self.target in _AUTO_GROUP and self.group_size is not None:
            raise ValueError(
                f"group_size is {self.group_size}, and palettes of groups need iOS18: set group_size to none "
                "or minimum_deployment_target to iOS18"
            )
        if self.target == "coreml-int4" or self.states or self.palette_dtype == "int8":
            what = "states need" if self.states else "coreml-int4 and palettes of int8 need"
            raise ValueError(
                f"{what} minimum_deployment_target iOS18; it is {self.minimum_deployment_target}"
            )

    def problems(self, candidate: Candidate) -> list[Problem]:
        """Operations of the traced module that Core ML's converter cannot translate, and damaged weights."""
        module = coreml_convert.prepare(candidate.module)
        damaged = _damaged(module)
        if damaged:
            return damaged
        if self.activations == "int8" and (missing := coreml_activations.needed(candidate, self.target)):
            return missing
        return coreml_convert.unsupported(module, coreml_convert.examples(candidate.inputs, None))

    def export(self, candidate: Candidate, data: Data, out: Path) -> Artifact:
        """Write `out` (`.mlpackage`). Raises UnsupportedOpError, ModelError or OutputError."""
        module = coreml_convert.prepare(candidate.module)
        example = coreml_convert.examples(candidate.inputs, _sample(data))
        self._refuse(module, example)
        notes: list[Problem] = []
        module = self._rounded(candidate, module, notes)
        wanted = self._conversion(candidate, module, example)
        placed = self._placed(module, example, wanted, data, notes)
        if placed is None:
            compress = self._compression(candidate, module, data, notes)
            spec, weights, skipped = _program(module, example, wanted, compress, notes)
        else:
            compress = self._palettes(None, notes, placed.bits_of)
            spec, weights, skipped = _program(placed.module, example, wanted, compress, notes)
        artifact = self._drafted(candidate, data, out, wanted, skipped, notes)
        _describe(spec, artifact)
        with files.atomic(out) as temporary:
            coreml_file.write(temporary, spec, weights)
            described = manifest.describe(artifact, temporary)
            if self.size is not None and described.size_bytes > coreml_budget.parse(self.size):
                raise ModelError(
                    f"{out.name} takes {described.size_bytes} bytes, more than {self.size}: allow more"
                )
            return described

    def export_functions(self, candidates: Mapping[str, Candidate], out: Path) -> Artifact:
        """One package of a function for each candidate, weights and states shared; the first is the default.

        Raises UnsupportedOpError, ModelError or OutputError.
        """
        writer, notes, skipped = BlobWriter(), list[Problem](), dict[Problem, None]()
        specs, conversions, weights = {}, [], b""
        for name, candidate in candidates.items():
            module = coreml_convert.prepare(candidate.module)
            example = coreml_convert.examples(candidate.inputs, None)
            self._refuse(module, example)
            conversions.append(self._conversion(candidate, module, example))
            compress = self._compression(candidate, module, Data(), notes)
            specs[name], weights, left = _program(module, example, conversions[-1], compress, notes, writer)
            skipped |= dict.fromkeys(left)
        spec, first = coreml_functions.joined(specs), next(iter(candidates.values()))
        told = list(dict.fromkeys(notes))
        artifact = self._drafted(first, Data(), out, conversions[0], list(skipped), told)
        _describe(spec, artifact)
        with files.atomic(out) as temporary:
            coreml_file.write(temporary, spec, weights)
            return manifest.describe(artifact, temporary)

    def _drafted(
        self,
        candidate: Candidate,
        data: Data,
        out: Path,
        wanted: coreml_convert.Conversion,
        skipped: list[Problem],
        notes: list[Problem],
    ) -> Artifact:
        return manifest.draft(
            replace(candidate, history=(*candidate.history, self._record(notes))),
            data,
            path=out,
            target=self.target,
            inputs=wanted.inputs,
            outputs=wanted.outputs,
            skipped=skipped,
            made_with=("coremltools",),
        )

    def _rounded(self, candidate: Candidate, module: nn.Module, notes: list[Problem]) -> nn.Module:
        if self.activations == "float":
            return module
        missing = coreml_activations.needed(candidate, self.target)
        if missing or candidate.quantization is None:
            raise ModelError(missing[0].reason)
        return coreml_activations.rounded(candidate.module, candidate.quantization, notes)

    def _refuse(self, module: nn.Module, example: tuple[torch.Tensor, ...]) -> None:
        damaged = _damaged(module)
        if damaged:
            raise ModelError(f"{damaged[0].module}: {damaged[0].reason}; load an earlier checkpoint")
        missing = [p for p in coreml_convert.unsupported(module, example) if p.op != "torch.jit.trace"]
        if missing:
            listed = ", ".join(f"{p.op} in {p.module or 'the model'}" for p in missing)
            raise UnsupportedOpError(
                f"Core ML has no operation for {listed}; rewrite these parts of the model"
            )

    def _conversion(
        self, candidate: Candidate, module: nn.Module, example: tuple[torch.Tensor, ...]
    ) -> coreml_convert.Conversion:
        bytes_pass = self.minimum_deployment_target == "iOS26"
        inputs = tuple(
            replace(i, dtype=coreml_convert.door_dtype(i.dtype, bytes_pass)) for i in candidate.inputs
        )
        return coreml_convert.Conversion(
            inputs=inputs,
            outputs=coreml_convert.outputs_of(module, example, bytes_pass),
            precision=self.compute_precision or ("float32" if self.target == "coreml-fp32" else "float16"),
            deployment_target=self.minimum_deployment_target,
            states=self.states,
        )

    def _compression(
        self, candidate: Candidate, module: nn.Module, data: Data, notes: list[Problem]
    ) -> Replace | None:
        bits = _BITS.get(self.target)
        if bits is None:
            return None
        modern = self.minimum_deployment_target in _MODERN
        if self.target.startswith("coreml-pal"):
            return self._palettes(self._importance(candidate, module, data, notes), notes, {})
        plan = dict(candidate.quantization.weights) if candidate.quantization else {}
        if candidate.quantization and not candidate.quantization.activations and self.target == "coreml-int4":
            return Planned(plan)
        block = self.block_size if self.target == "coreml-int4" else None
        return Linear(bits, block, modern, self.min_elements, plan, notes)

    def _palettes(
        self, importance: Importance | None, notes: list[Problem], bits_of: Mapping[str, int]
    ) -> Palettize:
        return Palettize(
            bits=_BITS[self.target],
            group_size=self._group_size,
            modern=self.minimum_deployment_target in _MODERN,
            min_elements=self.min_elements,
            depthwise=self.depthwise,
            importance=importance,
            palette_dtype=self.palette_dtype,
            notes=notes,
            bits_of=bits_of,
        )

    @property
    def _group_size(self) -> int | None:
        return _AUTO_GROUP[self.target] if self.group_size == "auto" else self.group_size

    def _placed(
        self,
        module: nn.Module,
        example: tuple[torch.Tensor, ...],
        wanted: coreml_convert.Conversion,
        data: Data,
        notes: list[Problem],
    ) -> coreml_place.Placed | None:
        """The model with its weights on palettes already, where that is wanted and can be done."""
        if not self.target.startswith("coreml-pal") or self.assignment == "nearest" or self.states:
            return None
        settings = coreml_place.Settings(
            _BITS[self.target], self._group_size, self.min_elements, self.samples,
            None if self.size is None else coreml_budget.parse(self.size), self.assignment == "gptq",
            self.depthwise == "int8",
        )  # fmt: skip
        quick = self._palettes(None, [], {})

        def size() -> int:
            spec, weights, _ = _program(module, example, wanted, quick, [])
            return int(spec.ByteSize()) + len(weights)

        return coreml_place.place(module, example, data, settings, size, notes)

    def _importance(
        self, candidate: Candidate, module: nn.Module, data: Data, notes: list[Problem]
    ) -> Importance | None:
        if self.importance == "none" or self.states:
            return None
        if data.calibration is None:
            notes.append(Problem("", "palettes", "every weight counts alike: there is no calibration data"))
            return None
        batches = itertools.islice(data.calibration.batches(1), self.samples)
        samples = [coreml_convert.examples(candidate.inputs, batch) for batch in batches]
        measured = coreml_importance.measure(module, samples, self.min_elements)
        if measured is None:
            notes.append(Problem("", "palettes", "every weight counts alike: the module has no gradients"))
        return measured

    def _record(self, notes: list[Problem]) -> StepRecord:
        return StepRecord(
            self.target, "export", asdict(self), tuple(f"{n.module}: {n.reason}" for n in notes)
        )


def _program(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    wanted: coreml_convert.Conversion,
    compress: Replace | None,
    notes: list[Problem],
    writer: BlobWriter | None = None,
) -> tuple[Any, bytes, list[Problem]]:
    """(spec, weight file, what stayed as it was) of a converted and compressed module.

    `writer`: of a weight file that several programs share.
    """
    program = coreml_convert.convert(module, example, wanted)
    spec, weights = _spec_and_weights(program)
    names = coreml_convert.constant_names(program, module)
    weights, skipped = rewrite(spec, weights, compress, names, notes, writer)
    return spec, weights, skipped


def _sample(data: Data) -> Batch | None:
    source = data.calibration or data.evaluation
    return next(iter(source.batches(1)), None) if source else None


def _damaged(module: nn.Module) -> list[Problem]:
    """Parameters that hold NaN or Inf (a buffer may: masks of -inf are buffers)."""
    found = []
    for name, tensor in module.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            found.append(Problem("parameter", name, f"{bad} of {tensor.numel()} values are NaN or Inf"))
    return found


def _spec_and_weights(program: Any) -> tuple[Any, bytes]:
    """What coremltools made; its temporary package is removed."""
    spec = Model_pb2.Model()
    spec.CopyFrom(program.get_spec())
    file = Path(program.weights_dir) / "weight.bin"
    weights = file.read_bytes() if file.exists() else b""
    shutil.rmtree(program.package_path, ignore_errors=True)
    return spec, weights


def _describe(spec: Any, artifact: Artifact) -> None:
    """Write our facts into the model's metadata; drop the date, which would differ from run to run."""
    metadata = spec.description.metadata
    metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    metadata.userDefined[manifest.KEY] = manifest.embedded(artifact)
