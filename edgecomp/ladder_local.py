"""Layer by layer: an artifact against its plan, each layer on the artifact's own inputs.

The plan's graph runs in order; wherever the artifact has the value of a node, the computed one is compared
with it and then replaced by it. An error therefore shows at the layer that makes it, and not below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from edgecomp import door
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.numerics import metrics
from edgecomp.spec import Batch, QuantizationPlan, TensorQuantization

_ROUND = torch.fake_quantize_per_tensor_affine

# What a sound export stays within: rounding of another kernel moves single values by one step.
MAX_BIAS_STEPS = 0.3
MAX_BEYOND_ONE_STEP = 0.005
MAX_OFF_GRID = 0.05
# An integer layer of which the plan is not known: rounding alone leaves more than this.
MIN_ROUNDED_DB = 15.0
# Float artifacts: largest error as a share of the layer's largest value.
FLOAT_TOLERANCE = {"float32": 1e-3, "float16": 3e-2}


@dataclass
class LayerTally:
    """Errors of one layer, in steps of its output scale (or in shares of its largest value)."""

    node: str
    module: str
    op: str
    step: float | None
    zero_point: int
    count: int = 0
    total: float = 0.0
    beyond: int = 0
    off_grid: int = 0
    largest: float = 0.0
    magnitude: float = 0.0
    local_noise: float = 0.0
    local_signal: float = 0.0
    border: float = 0.0
    inside: float = 0.0
    per_channel: list[np.ndarray] = field(default_factory=list)
    saturated: int = 0
    stored: str = ""

    def add(self, found: np.ndarray, expected: np.ndarray, limits: tuple[int, int] | None) -> None:
        error = found.astype(np.float64) - expected.astype(np.float64)
        self.local_noise += float(np.sum(error**2))
        self.local_signal += float(np.sum(expected.astype(np.float64) ** 2))
        self.magnitude = max(self.magnitude, float(np.abs(expected).max(initial=0)))
        self.largest = max(self.largest, float(np.abs(error).max(initial=0)))
        self.count += error.size
        if error.ndim == 4 and min(error.shape[2:]) > 4:
            self.inside += float(np.mean(error[:, :, 2:-2, 2:-2] ** 2))
            edge = error.copy()
            edge[:, :, 2:-2, 2:-2] = 0
            shell = edge.size - error[:, :, 2:-2, 2:-2].size
            self.border += float(np.sum(edge**2) / shell)
        if error.ndim >= 2:
            axes = tuple(i for i in range(error.ndim) if i != 1)
            self.per_channel.append(np.stack([error.mean(axis=axes), error.std(axis=axes)]))
        if self.step is None:
            return
        steps = error / self.step
        self.total += float(steps.sum())
        self.beyond += int(np.sum(np.abs(steps) > 1.01))
        grid = found.astype(np.float64) / self.step
        self.off_grid += int(np.sum(np.abs(grid - np.rint(grid)) > 0.05))
        if limits is not None:
            stored = np.rint(grid) + self.zero_point
            self.saturated += int(np.sum((stored <= limits[0]) | (stored >= limits[1])))

    @property
    def local_db(self) -> float:
        return metrics.ratio_db(self.local_signal, self.local_noise)

    @property
    def bias_steps(self) -> float | None:
        return None if self.step is None else self.total / self.count

    def complaint(self, tolerance: float) -> str | None:
        """Why this layer is not what the plan says, or None."""
        if self.step is None and self.stored.startswith(("int", "uint")):
            if self.local_db >= MIN_ROUNDED_DB:
                return None
            return f"reaches {self.local_db:.1f} dB on its own inputs; {self.guess()}"
        if self.step is None:
            share = self.largest / max(self.magnitude, 1e-12)
            if share <= tolerance:
                return None
            return f"differs by up to {share:.2%} of its largest value; {self.guess()}"
        if self.stored.startswith("float"):
            return "is kept as float, the plan says integer"
        if self.off_grid > MAX_OFF_GRID * self.count:
            return (
                f"{self.off_grid / self.count:.0%} of its values do not lie on the plan's grid (scale "
                f"{self.step:.4g}): another scale, or computed in float"
            )
        bias = self.total / self.count
        beyond = self.beyond / self.count
        if abs(bias) > MAX_BIAS_STEPS and beyond <= MAX_BEYOND_ONE_STEP:
            return f"is off by {bias:+.2f} steps on average: the zero point is wrong"
        if abs(bias) > MAX_BIAS_STEPS or beyond > MAX_BEYOND_ONE_STEP:
            return (
                f"{beyond:.1%} of its values differ by more than a step (up to "
                f"{self.largest / self.step:.0f}, {bias:+.2f} on average); {self.guess()}"
            )
        return None

    def guess(self) -> str:
        """What the pattern of errors looks like."""
        if self.border > 20 * self.inside and self.border > 0:
            return "the errors lie at the border: padding"
        if self.per_channel:
            means, spreads = np.mean(self.per_channel, axis=0)
            if np.abs(means).mean() > 2 * spreads.mean():
                return "each channel is off by a constant: bias"
        if self.step is not None and self.saturated > 0.05 * self.count:
            return "many values stand at the end of the range: saturation or a wrong scale"
        return "weights, axes or the arithmetic differ"


class _Forced(Interpreter):
    """Runs the plan's graph; nodes whose value the artifact gave are compared and replaced."""

    def __init__(
        self, graph_module: GraphModule, given: Mapping[str, np.ndarray], tallies: dict[str, LayerTally],
        plan: QuantizationPlan | None,
    ) -> None:  # fmt: skip
        super().__init__(graph_module)
        self._given, self._tallies, self._plan = given, tallies, plan

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        subject = subject_of(n)
        if subject is None or not isinstance(result, Tensor) or subject.name not in self._given:
            return result
        found = self._given[subject.name]
        if found.size != result.numel():
            return result
        quantization = self._plan.activations.get(subject.name) if self._plan else None
        self._tally(subject, quantization).add(
            found.reshape(tuple(result.shape)), result.numpy(), _limits(quantization)
        )
        return torch.from_numpy(np.ascontiguousarray(found)).reshape(result.shape).to(result.dtype)

    def _tally(self, node: Node, quantization: TensorQuantization | None) -> LayerTally:
        if node.name not in self._tallies:
            step = float(quantization.scale) if quantization is not None else None
            zero_point = int(quantization.zero_point) if quantization is not None else 0
            self._tallies[node.name] = LayerTally(
                node.name, node.meta.get("module", ""), op_name(node), step, zero_point
            )
        return self._tallies[node.name]


def op_name(node: Node) -> str:
    """`aten.conv2d.default` -> `conv2d`."""
    words = str(node.target).split(".")
    return words[1] if words[0] == "aten" and len(words) > 1 else words[0]


def subject_of(node: Node) -> Node | None:
    """The node whose value this one is: its own, or what it rounds. Rounded nodes wait for the rounding."""
    if node.op != "call_function":
        return None
    if node.target is _ROUND:
        source = node.args[0]
        return source if isinstance(source, Node) and source.op == "call_function" else None
    if any(u.target is _ROUND for u in node.users):
        return None
    return node


def _limits(quantization: TensorQuantization | None) -> tuple[int, int] | None:
    return None if quantization is None else (quantization.spec.qmin, quantization.spec.qmax)


def local_errors(
    graph_module: GraphModule,
    plan: QuantizationPlan | None,
    session: Any,
    batches: Sequence[Batch],
) -> list[LayerTally]:
    """One tally for each node that the artifact keeps, in order of execution.

    `session` has `layers(arrays)` or `tensors(arrays)`; `plan` None: compared with the float graph.
    """
    rounded = fake_quantize(graph_module, plan) if plan is not None else graph_module
    tallies: dict[str, LayerTally] = {}
    kinds: Mapping[str, str] = {}
    for inputs in samples_of(batches):
        stored = [door.into(a, s) for a, s in zip(inputs, session.inputs, strict=True)]
        given = layers_of(session, stored)
        if isinstance(session, NamedLayers):
            kinds = session.stored_types
        elif not kinds and hasattr(session, "layers"):
            kinds = {n.rpartition("/")[2]: str(a.dtype) for n, a in session.tensors(stored).items()}
        tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in inputs]
        with torch.no_grad():
            _Forced(rounded, given, tallies, plan).run(*tensors)
    for tally in tallies.values():
        tally.stored = kinds.get(tally.node, "")
    order = {n.name: i for i, n in enumerate(graph_module.graph.nodes)}
    return sorted(tallies.values(), key=lambda t: order.get(t.node, 0))


class NamedLayers:
    """A session whose layers go by the weights that they use, under the names of graph nodes.

    `nodes`: the session's name of a weighted operation -> graph node. Operations without a weight are not
    seen: their errors show at the next one that has.
    """

    def __init__(self, session: Any, nodes: Mapping[str, str]) -> None:
        self._session, self._nodes = session, nodes
        self.inputs, self.outputs, self.run = session.inputs, session.outputs, session.run
        told = [(nodes.get(op.name, ""), op.dtype) for op in session.realized()]
        self.stored_types = {node: dtype for node, dtype in told if node}

    def layers(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        found = self._session.weighted(arrays)
        return {self._nodes[label]: value for label, value in found.items() if label in self._nodes}


def shows_layers(session: Any) -> bool:
    return hasattr(session, "layers") or hasattr(session, "tensors")


def layers_of(session: Any, arrays: Sequence[np.ndarray]) -> Mapping[str, np.ndarray]:
    """Every value that the artifact keeps, by graph node name: real numbers in torch's order."""
    found: Mapping[str, np.ndarray] = (
        session.layers(arrays) if hasattr(session, "layers") else session.tensors(arrays)
    )
    return found


def samples_of(batches: Sequence[Batch]) -> Iterator[tuple[np.ndarray, ...]]:
    """Samples one by one, batch dimension kept."""
    for batch in batches:
        for i in range(len(batch)):
            yield tuple(a[i : i + 1] for a in batch.inputs)
