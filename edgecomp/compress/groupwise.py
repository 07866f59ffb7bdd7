"""Weights of 2 to 8 bits in groups: one decision for every target that stores it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgecomp import progress
from edgecomp.compress import group_bits, group_scaling, group_stream, group_work, observe, rules
from edgecomp.compress.ptq import example_inputs
from edgecomp.errors import DataError, InputError, ModelError
from edgecomp.graph import capture, constants
from edgecomp.graph.vocabulary import WEIGHTED
from edgecomp.numerics import group_gptq, groupwise, hqq
from edgecomp.numerics.groupwise import Grid
from edgecomp.spec import Candidate, Data, QuantizationPlan, StepRecord, TensorQuantization

aten = torch.ops.aten

Method = Literal["rtn", "hqq", "gptq"]
_FLOAT_BITS = 32
_NOTE_EVERY_S = 15.0
_SENSITIVITY_SAMPLES = 8


@dataclass(frozen=True)
class QuantizeWeights:
    """Weights of linear layers and embeddings as integers with a scale for every group of inputs.

    `group_size`: 16, 32, 64 or 128 inputs, None for one scale an output; where it does not divide a layer's
    inputs the next smaller that does is taken, and noted. `symmetric`: no zero points, which TFLite needs.
    `narrow`: integers from -7 (not -8), which TFLite files are clipped to: for the same integers everywhere.
    `method`: "rtn" (nearest, on scales by searched clipping), "hqq" (half-quadratic; neither needs data),
    or "gptq" (errors on the inputs of `samples` calibration samples, layer by layer). `scaling`: "awq"
    scales input channels first; needs data. `embedding_bits`: 4, 8, or 32 (float); a head tied to the
    embedding shares its integers. `exclude`: patterns of module names (or `type:linear`) that stay float.
    `work`: a folder that keeps each layer's decision, so that an interrupted run goes on.
    `size_budget`: bytes that all these weights may take, scales of 16 bits included; every weight then gets
    one of `widths` bits, by what its rounding costs (`group_bits`; needs data). `error_budget`: the same by a
    limit on the predicted cost, with the fewest bytes: nats a token for a language model (twice the KL
    divergence), else the squared error of the outputs.
    """

    method: Method = "gptq"
    bits: int = 4
    group_size: int | None = 32
    symmetric: bool = True
    narrow: bool = False
    scaling: Literal["none", "awq"] = "none"
    embedding_bits: int = 4
    samples: int = 64
    exclude: tuple[str, ...] = ()
    work: Path | None = None
    size_budget: int | None = None
    error_budget: float | None = None
    widths: tuple[int, ...] = group_bits.WIDTHS

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise InputError(f"method is {self.method!r}; expected one of {', '.join(get_args(Method))}")
        if self.bits not in group_bits.WIDTHS:
            raise InputError(f"bits is {self.bits}; expected 2, 3, 4, 6 or 8")
        if self.group_size is not None and self.group_size not in groupwise.SIZES:
            raise InputError(
                f"group_size is {self.group_size}; expected 16, 32, 64, 128, or none (one scale an output)"
            )
        if self.scaling not in ("none", "awq"):
            raise InputError(f"scaling is {self.scaling!r}; expected none or awq")
        if self.embedding_bits not in (*group_bits.WIDTHS, _FLOAT_BITS):
            raise InputError(
                f"embedding_bits is {self.embedding_bits}; expected 2, 3, 4, 6, 8, or 32 (float)"
            )
        self._check_budget()
        if self.samples < 1:
            raise InputError(f"samples is {self.samples}; expected at least 1")

    def _check_budget(self) -> None:
        if not self.widths or not set(self.widths) <= set(group_bits.WIDTHS):
            raise InputError(f"widths is {list(self.widths)}; expected some of 2, 3, 4, 6, 8")
        if self.size_budget is not None and self.error_budget is not None:
            raise InputError("size_budget and error_budget are both set; give one of them")
        for name, value in (("size_budget", self.size_budget), ("error_budget", self.error_budget)):
            if value is not None and value <= 0:
                raise InputError(f"{name} is {value}; expected more than 0")

    @property
    def mixed(self) -> bool:
        """Is there a budget that widths are chosen under?"""
        return self.size_budget is not None or self.error_budget is not None

    @property
    def needs_data(self) -> bool:
        return self.method == "gptq" or self.scaling == "awq" or self.mixed

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        """A candidate whose module is the canonical float graph and whose plan holds the integers.

        Raises DataError without calibration data for a method that needs it, ModelError when the model has
        no linear layer, or computes NaN or Inf on the data.
        """
        source = data.calibration or data.train
        if self.needs_data and (source is None or len(source) == 0):
            raise DataError(
                f"method {self.method!r} with scaling {self.scaling!r} needs calibration data: give "
                "--calib, or data.calibration in the recipe; rtn and hqq without scaling or budget need none"
            )
        graph_module = capture(candidate.module, example_inputs(candidate))
        floats = rules.excluded(graph_module, self.exclude)
        chooser = Chooser(graph_module, self, floats)
        if self.needs_data and source is not None:
            samples = list(observe.tensor_batches(source, self.samples))
            _check_ids(chooser.graph_module, chooser.tables, samples)
            chooser.choose_widths(samples)
            chooser.by_inputs(samples)
        else:
            chooser.by_weights()
        quantization = QuantizationPlan({}, chooser.decided, {**chooser.left_float(), **floats})
        notes = [f"{name} stays float: {why}" for name, why in quantization.float_nodes.items()]
        record = StepRecord(
            "quantize-weights", "quantize", _plain(asdict(self)), (*chooser.notes.values(), *notes)
        )
        return replace(
            candidate,
            module=graph_module,
            quantization=quantization,
            history=(*candidate.history, record),
            original=candidate.original if candidate.original is not None else candidate.module,
        )


def _plain(settings: Mapping[str, object]) -> dict[str, object]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}


@dataclass
class Chooser:
    """Decides every weight of a graph; `decided` by parameter name, `notes` where it is not as asked."""

    graph_module: GraphModule
    settings: QuantizeWeights
    floats: Mapping[str, str]
    decided: dict[str, TensorQuantization] = field(default_factory=dict)
    restored: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    noted: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        nodes = [n for n in self.graph_module.graph.nodes if n.op == "call_function"]
        usable = [n for n in nodes if n.name not in self.floats]
        self.linears = [n for n in usable if _is_linear(n)]
        self.tables = [n for n in usable if _is_table(n)] if self._embeds else []
        if not self.linears and not self.tables:
            raise ModelError(
                "the model has no linear layer or embedding to store in groups; quantize its convolutions "
                "with the step quantize (weight_bits: 4)"
            )
        self.table_names = {str(n.args[0].target) for n in nodes if n.target is aten.embedding.default}
        self.total = len({str(n.args[1].target) for n in self.linears})
        self.store = group_work.Store(self.settings.work, _key(self.settings))

    @property
    def _embeds(self) -> bool:
        return self.settings.embedding_bits != _FLOAT_BITS

    def left_float(self) -> dict[str, str]:
        """Layers with weights that have no integers, and why."""
        found = {}
        for node in self.graph_module.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in WEIGHTED and not _is_linear(node):
                found[node.name] = "only linear layers and embeddings are stored in groups"
            elif _is_linear(node) and str(node.args[1].target) not in self.decided:
                found[node.name] = "it shares its weight with an embedding that stays float"
            elif _is_table(node) and not self._embeds:
                found[node.name] = "embedding_bits is 32"
        return found

    def choose_widths(self, samples: list[tuple[Tensor, ...]]) -> None:
        """Under a budget: the bits of every weight, by what its rounding costs on some of the samples."""
        settings = self.settings
        if not settings.mixed:
            return
        layers, few = [*self.linears, *self.tables], samples[:_SENSITIVITY_SAMPLES]
        curvatures, tokens = group_bits.measured(self.graph_module, layers, few)
        options = {}
        for name, value in self._weights().items():
            if name in self.table_names and not self._embeds or name not in curvatures:
                continue
            group = groupwise.group_for(value.shape[1], settings.group_size)
            options[name] = group_bits.choices(
                value, curvatures[name], settings.widths, settings.symmetric, group, settings.narrow
            )
        chosen = group_bits.allocated(options, settings.size_budget, settings.error_budget)
        self.widths = {name: choice.bits for name, choice in chosen.items()}
        self.notes["widths"] = group_bits.told(chosen, tokens)

    def by_weights(self) -> None:
        """Without data: every weight alone."""
        for name, value in self._weights().items():
            grid = self._grid(name, value.shape[1])
            if grid is not None:
                self._keep(name, value, *self._alone(value, grid), grid)

    def by_inputs(self, samples: list[tuple[Tensor, ...]]) -> None:
        """With data: a stage at a time, from its inputs as the layers before it, rounded, give them."""
        tied = {str(n.args[1].target) for n in self.linears} & self.table_names
        for table in self.tables:
            name = str(table.args[0].target)
            value = self._value(name)
            grid = self._grid(name, value.shape[1])
            if grid is not None:
                self._keep(name, value, *self._alone(value, grid), grid, final=name not in tied)
        group_stream.run(self.graph_module, samples, self.linears, self.restored, self._stage)

    def _stage(self, stage: group_stream.Stage) -> None:
        names = list(dict.fromkeys(str(n.args[1].target) for n in stage.layers))
        waiting = [n for n in names if n not in self.decided]
        grids = {n: self._grid(n, self._value(n).shape[1]) for n in waiting}
        chosen = {n: g for n, g in grids.items() if g is not None}
        if not chosen:
            return
        hessian, magnitude = _moments(stage.inputs, names[0])
        if self.settings.scaling == "awq" and list(chosen) == names and not self.table_names & set(names):
            hessian = self._scale(stage, list(chosen), list(chosen.values()), hessian, magnitude)
        for name, grid in chosen.items():
            value = self._value(name)
            self._keep(name, value, *self._by_method(name, value, hessian, grid), grid)
            self._progress()

    def _by_method(
        self, name: str, value: np.ndarray, hessian: np.ndarray, grid: Grid
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.settings.method != "gptq":
            return self._alone(value, grid)
        if name in self.table_names:  # the same rows are also added up as embeddings, error by error
            hessian = hessian + np.eye(len(hessian)) * np.trace(hessian) / len(hessian)
        kept = f"{name}:{grid.bits}"
        known = self.store.get(kept, value, hessian)
        if known is None:
            known = group_gptq.rounded(value, hessian, grid)
            self.store.put(kept, value, hessian, known)
        return known

    def _scale(
        self,
        stage: group_stream.Stage,
        names: list[str],
        grids: list[Grid],
        hessian: np.ndarray,
        magnitude: np.ndarray,
    ) -> np.ndarray:
        """Scale the stage's input channels where they can be divided before it; gives its new Hessian."""
        place = group_scaling.place_of(self.graph_module, stage.source, stage.layers)
        if place is None or place.target in self.table_names:
            return hessian
        scale = group_scaling.chosen([self._value(n) for n in names], grids, hessian, magnitude)
        group_scaling.divide(self.graph_module, place, scale)
        if place.target in self.decided:
            self._divide_rows(place.target, scale)
        for name in names:
            group_scaling.set_constant(self.graph_module, name, torch.from_numpy(self._value(name) * scale))
        factors = torch.from_numpy(scale)
        stage.inputs[:] = [x / factors for x in stage.inputs]
        return hessian / scale[:, None] / scale[None, :]

    def _divide_rows(self, name: str, scale: np.ndarray) -> None:
        """A rounded layer whose outputs are divided: its scales take the division."""
        q = self.decided[name]
        factors = scale[:, None] if q.scale.ndim == 2 else scale
        moved = replace(q, scale=groupwise.halves(q.scale / factors))
        self.decided[name] = moved
        self.restored[name] = torch.from_numpy(groupwise.restore(*_arrays(moved)))

    def _alone(self, value: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        find = hqq.fitted if self.settings.method == "hqq" else groupwise.searched
        scale, zero = find(value, grid)
        return groupwise.round_to(value, scale, zero, grid), scale, zero

    def _keep(
        self,
        name: str,
        value: np.ndarray,
        integers: np.ndarray,
        scale: np.ndarray,
        zero: np.ndarray,
        grid: Grid,
        *,
        final: bool = True,
    ) -> None:
        self.restored[name] = torch.from_numpy(groupwise.restore(integers, scale, zero))
        if final:
            self.decided[name] = groupwise.assemble(integers, scale, zero, grid, value.shape)

    def _grid(self, name: str, inputs: int) -> Grid | None:
        """The grid of a weight, None for one that stays float; a group size that does not divide is noted."""
        table = name in self.table_names
        bits = self.settings.embedding_bits if table else self.settings.bits
        bits = self.widths.get(name, bits)
        if bits == _FLOAT_BITS:
            return None
        asked = self.settings.group_size
        size = groupwise.group_for(inputs, asked)
        if asked is not None and size != asked:
            told = f"groups of {size}" if size < inputs else "one scale an output"
            self.notes[name] = (
                f"{name}: {told}, not groups of {asked}: {asked} does not divide {inputs} inputs"
            )
        return Grid(bits, self.settings.symmetric, size, self.settings.narrow)

    def _weights(self) -> dict[str, np.ndarray]:
        names = [str(n.args[0].target) for n in self.tables] + [str(n.args[1].target) for n in self.linears]
        return {name: self._value(name) for name in dict.fromkeys(names)}

    def _value(self, name: str) -> np.ndarray:
        owner, _, leaf = name.rpartition(".")
        value: Tensor = getattr(self.graph_module.get_submodule(owner), leaf)
        return value.detach().float().numpy()

    def _progress(self) -> None:
        now, done = time.monotonic(), len(self.decided)
        if now - self.noted > _NOTE_EVERY_S:
            self.noted = now
            left = (now - self.began) / max(done, 1) * max(self.total - done, 0)
            progress.note(f"weights: {done} of {self.total} decided, about {left:.0f} s left")


def _is_linear(node: Node) -> bool:
    return node.target is aten.linear.default and constants.is_constant(node.args[1])


def _is_table(node: Node) -> bool:
    return node.target is aten.embedding.default and constants.is_constant(node.args[0])


def _moments(inputs: list[Tensor], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean of x x^T [in, in] float64 and of |x| [in] over samples and positions. Raises ModelError on NaN."""
    width = inputs[0].shape[-1]
    hessian, magnitude, count = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width), 0
    for x in inputs:
        rows = x.reshape(-1, width).float()
        hessian += (rows.T @ rows).double()
        magnitude += rows.abs().sum(0)
        count += len(rows)
    if not bool(torch.isfinite(hessian).all()):
        raise ModelError(
            f"the inputs of {name!r} hold NaN or Inf on the calibration data; check the weights and the data "
            "(a fully masked row of an attention gives NaN)"
        )
    return (hessian / count).numpy(), (magnitude / count).numpy()


def _arrays(q: TensorQuantization) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scale, zero, _ = groupwise.in_groups(q)
    if q.values is None:
        raise ModelError("a decided weight has no integers; quantize again")
    return q.values, scale, zero


def _key(settings: QuantizeWeights) -> str:
    told = {k: v for k, v in asdict(settings).items() if k != "work"}
    return repr(sorted(told.items(), key=lambda item: item[0]))


def _check_ids(
    graph_module: GraphModule, tables: Sequence[Node], samples: Sequence[tuple[Tensor, ...]]
) -> None:
    """Raise DataError where calibration text names a row that an embedding does not have."""
    inputs = graph_module.graph.find_nodes(op="placeholder")
    for table in tables:
        if table.args[1] not in inputs:
            continue
        place, rows = inputs.index(table.args[1]), len(constants.value_of(graph_module, table.args[0]))
        for sample in samples:
            low, high = int(sample[place].min()), int(sample[place].max())
            if low < 0 or high >= rows:
                raise DataError(
                    f"the calibration data holds id {high if high >= rows else low}; the embedding "
                    f"has {rows} rows, from 0: was the text tokenized for another model?"
                )
