"""How many bits each weight gets, under a budget of bytes or of error, from what its rounding costs.

The cost of rounding a weight alone is measured in one pass forward and back over calibration samples: for a
linear layer y = W x, cost(e) = sum over outputs and inputs of E[g_o^2] E[x_i^2] e_oi^2, where e is the
rounding and g the gradient at y. That is the diagonal of the Fisher information in its Kronecker-factored
form (Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML
2015, section 3). For a model that gives a score for every token of its vocabulary, g is of the log
probability of a token drawn from the model, and half the cost is the expected KL divergence in nats; for
others g is of the outputs' projection on random signs, and the cost is the expected squared error.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from edgecomp.errors import InputError
from edgecomp.numerics import groupwise
from edgecomp.numerics.groupwise import Grid

aten = torch.ops.aten

WIDTHS = (2, 3, 4, 6, 8)
_ROWS = 192
"""Outputs (or rows of a table) on which the rounding error of a weight is measured; the rest like them."""
_SCALE_BITS = 16


@dataclass(frozen=True, eq=False)
class Curvature:
    """What one weight's rounding costs. `outputs` [out], `inputs` [in]: factors of a linear layer's cost.

    `table` [in]: of an embedding, the squares of the gradient at a token's row; a head tied to the embedding
    has all three, and the cost of both.
    """

    outputs: np.ndarray | None = None
    inputs: np.ndarray | None = None
    table: np.ndarray | None = None

    @property
    def weights(self) -> np.ndarray | None:
        """How much each input counts [in]: the clipping of scales is searched by it."""
        return self.table if self.inputs is None else self.inputs

    def rows(self, count: int) -> np.ndarray:
        """Rows on which rounding is tried: spread evenly, and those whose outputs cost most.

        In a head a few frequent tokens carry nearly all of the cost.
        """
        even = np.linspace(0, count - 1, min(_ROWS, count)).astype(int)
        outputs = np.zeros(0) if self.outputs is None else self.outputs
        costly = np.argsort(-outputs, kind="stable")[:_ROWS]
        return np.unique(np.concatenate([even, costly]))

    def cost(self, error: np.ndarray, rows: np.ndarray) -> float:
        """Of the rounding errors [rows, in] of some rows, as if those of all rows were like them."""
        squares, found = np.square(error), 0.0
        if self.inputs is not None and self.outputs is not None:
            known = self.outputs[rows]
            mean = np.average(squares @ self.inputs, weights=known if known.sum() > 0 else None)
            found += float(mean * self.outputs.sum())
        if self.table is not None:
            found += float((squares @ self.table).mean())
        return found


@dataclass(frozen=True)
class Choice:
    """One width of one weight: its bytes, with scales, and its cost."""

    bits: int
    size_bytes: float
    cost: float


class _Listener(Interpreter):
    """Runs a graph and keeps the inputs and outputs of the layers that are asked for."""

    def __init__(self, graph_module: GraphModule, layers: Sequence[Node]) -> None:
        super().__init__(graph_module)
        self.layers = set(layers)
        self.seen: dict[Node, tuple[Tensor | None, Tensor]] = {}

    def run_node(self, n: Node) -> Any:
        made = super().run_node(n)
        if n in self.layers:
            if made.requires_grad:
                made.retain_grad()
            else:
                made = made.detach().requires_grad_(True)
            source = n.args[0] if n.target is aten.linear.default else None
            self.seen[n] = (self.env[source].detach() if isinstance(source, Node) else None, made)
        return made


def measured(
    graph_module: GraphModule, layers: Sequence[Node], samples: Sequence[tuple[Tensor, ...]], seed: int = 0
) -> tuple[dict[str, Curvature], bool]:
    """Name of a weight -> its curvature over the samples; and whether costs are of tokens (KL, in nats).

    `layers`: linear layers and embeddings. A weight that two layers share has the cost of both.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = [p for p in graph_module.parameters() if p.requires_grad]
    for parameter in wanted:  # only gradients at layers are asked for
        parameter.requires_grad_(False)
    sums: dict[Node, list[Tensor]] = {}
    count, tokens = 0, False
    for sample in samples:
        listener = _Listener(graph_module, layers)
        with torch.enable_grad():
            output = listener.run(*sample)
            first = output[0] if isinstance(output, tuple | list) else output
            tokens = _is_vocabulary(first, graph_module, layers)
            projected, positions = _projected(first, tokens, generator)
            projected.backward()
        count += positions
        for node, (x, y) in listener.seen.items():
            if y.grad is not None:
                _add(sums, node, x, y.grad)
    for parameter in wanted:
        parameter.requires_grad_(True)
    return _by_name(sums, count), tokens


def _is_vocabulary(output: Tensor, graph_module: GraphModule, layers: Sequence[Node]) -> bool:
    tables = [n.args[0] for n in layers if n.target is aten.embedding.default]
    sizes = {int(t.meta["val"].shape[0]) for t in tables if isinstance(t, Node) and "val" in t.meta}
    return output.dim() == 3 and int(output.shape[-1]) in sizes


def _projected(output: Tensor, tokens: bool, generator: torch.Generator) -> tuple[Tensor, int]:
    """What is differentiated, and over how many independent draws its square is a mean."""
    if not tokens:
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2.0 - 1.0
        return (output * signs).sum(), 1
    flat = output.reshape(-1, output.shape[-1])
    log_odds = torch.log_softmax(flat, -1)
    drawn = torch.multinomial(log_odds.detach().exp(), 1, generator=generator)
    return log_odds.gather(1, drawn).sum(), len(flat)


def _add(sums: dict[Node, list[Tensor]], node: Node, x: Tensor | None, gradient: Tensor) -> None:
    squares = gradient.reshape(-1, gradient.shape[-1]).double().square().sum(0)
    inputs = torch.ones(1) if x is None else x.reshape(-1, x.shape[-1]).double().square().mean(0)
    if node not in sums:
        sums[node] = [squares, inputs, torch.ones(1)]
    else:
        known = sums[node]
        sums[node] = [known[0] + squares, known[1] + inputs, known[2] + 1]


def _by_name(sums: Mapping[Node, list[Tensor]], count: int) -> dict[str, Curvature]:
    found: dict[str, Curvature] = {}
    for node, (squares, inputs, batches) in sums.items():
        gradient = (squares / max(count, 1)).numpy()
        table = node.target is aten.embedding.default
        name = str(node.args[0 if table else 1].target)
        known = found.get(name, Curvature())
        if table:
            found[name] = replace(known, table=gradient if known.table is None else known.table + gradient)
        elif known.outputs is None:
            found[name] = replace(known, outputs=gradient, inputs=(inputs / batches).numpy())
    return found


def choices(
    weight: np.ndarray, curvature: Curvature, widths: Sequence[int], symmetric: bool, group: int, narrow: bool
) -> list[Choice]:
    """Every width of a weight [out, in], its cost on scales by searched clipping; useless widths left out."""
    rows = curvature.rows(len(weight))
    part = weight[rows].astype(np.float32)
    found: list[Choice] = []
    for bits in sorted(widths):
        grid = Grid(bits, symmetric, group, narrow)
        scale, zero = groupwise.searched(part, grid, curvature.weights)
        restored = groupwise.restore(groupwise.round_to(part, scale, zero, grid), scale, zero)
        extra = _SCALE_BITS + (0 if symmetric else bits)
        size = weight.size * (bits + extra / group) / 8
        found.append(Choice(bits, size, curvature.cost(part - restored, rows)))
    return _hull(found)


def _hull(found: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of cost over bytes: each next byte buys less than those before."""
    kept: list[Choice] = []
    for choice in found:
        if kept and choice.cost >= kept[-1].cost:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-2], choice):
            kept.pop()
        kept.append(choice)
    return kept


def _slope(low: Choice, high: Choice) -> float:
    """Cost saved for each byte."""
    return (low.cost - high.cost) / (high.size_bytes - low.size_bytes)


def allocated(
    options: Mapping[str, Sequence[Choice]], size_bytes: float | None = None, cost: float | None = None
) -> dict[str, Choice]:
    """The width of every weight: least cost within `size_bytes`, or fewest bytes within `cost`.

    Every weight begins at its narrowest width; the widening that saves most cost for each byte goes first
    (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE TASSP 1988).
    Raises InputError when the budget cannot be met even so.
    """
    taken = dict.fromkeys(options, 0)
    size = sum(c[0].size_bytes for c in options.values())
    lost = sum(c[0].cost for c in options.values())
    if size_bytes is not None and size > size_bytes:
        raise InputError(
            f"size_budget is {size_bytes:.0f} bytes; the weights take {size:.0f} at the fewest bits of "
            "`widths`: allow more, or narrower widths"
        )
    waiting = [(-_slope(c[0], c[1]), name) for name, c in options.items() if len(c) > 1]
    heapq.heapify(waiting)
    while waiting and (cost is None or lost > cost):
        _, name = heapq.heappop(waiting)
        now, wider = options[name][taken[name]], options[name][taken[name] + 1]
        if size_bytes is not None and size + wider.size_bytes - now.size_bytes > size_bytes:
            continue
        taken[name] += 1
        size, lost = size + wider.size_bytes - now.size_bytes, lost + wider.cost - now.cost
        if taken[name] + 1 < len(options[name]):
            heapq.heappush(waiting, (-_slope(wider, options[name][taken[name] + 1]), name))
    if cost is not None and lost > cost:
        raise InputError(
            f"error_budget is {cost:g}; the weights cost {lost:g} even at the most bits of `widths`"
        )
    return {name: options[name][index] for name, index in taken.items()}


def told(chosen: Mapping[str, Choice], tokens: bool) -> str:
    """One line on the widths, their bytes and their predicted cost."""
    counts: dict[int, int] = {}
    for choice in chosen.values():
        counts[choice.bits] = counts.get(choice.bits, 0) + 1
    widths = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(counts.items()))
    cost, size = sum(c.cost for c in chosen.values()), sum(c.size_bytes for c in chosen.values())
    unit = (
        f"KL divergence of {cost / 2:.3g} nats a token" if tokens else f"squared error of outputs {cost:.3g}"
    )
    return f"weights: {widths}; {size:.0f} bytes with scales; predicted {unit}"
