"""Where the noise of quantization comes in: SQNR of every quantized value against the float graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.graph.interpret import watch
from edgecomp.numerics import metrics
from edgecomp.spec import Candidate, DataSource

_SAMPLES = 32


class _Tally:
    """Energies of signal and noise for each graph node, sample by sample."""

    def __init__(self, node_of: dict[str, str]) -> None:
        self._node_of = node_of
        self._expected: dict[str, np.ndarray] = {}
        self.signal: dict[str, float] = dict.fromkeys(node_of.values(), 0.0)
        self.noise: dict[str, float] = dict.fromkeys(node_of.values(), 0.0)

    def keep(self, node: Node, value: Tensor) -> None:
        self._expected[node.name] = value.numpy().astype(np.float64)

    def compare(self, node: Node, value: Tensor) -> None:
        name = self._node_of[node.name]
        expected = self._expected.pop(name)
        self.signal[name] += float((expected**2).sum())
        self.noise[name] += float(((value.numpy() - expected) ** 2).sum())


def layer_noise(candidate: Candidate, source: DataSource) -> list[dict[str, Any]]:
    """One entry for each value that the plan rounds: `name`, `module`, `sqnr_db`, `kind`.

    Both graphs run on the first samples of the data, so a figure holds the noise of all layers before it.
    """
    plan = candidate.quantization
    if plan is None:
        return []
    rounded = fake_quantize(candidate.module, plan)
    rounding = rounded.graph.find_nodes(op="call_function", target=torch.fake_quantize_per_tensor_affine)
    node_of = {n.name: n.args[0].name for n in rounding}
    tally = _Tally(node_of)
    batch = next(iter(source.batches(_SAMPLES)))
    for i in range(len(batch)):
        inputs = [torch.from_numpy(np.ascontiguousarray(a[i : i + 1])) for a in batch.inputs]
        watch(candidate.module, inputs, tally.keep, frozenset(node_of.values()))
        watch(rounded, inputs, tally.compare, frozenset(node_of))
    modules = {n.name: n.meta.get("module", "") for n in candidate.module.graph.nodes}
    return [
        {
            "name": name,
            "module": modules.get(name, ""),
            "sqnr_db": metrics.ratio_db(signal, tally.noise[name]),
            "kind": "activations",
        }
        for name, signal in tally.signal.items()
    ]
