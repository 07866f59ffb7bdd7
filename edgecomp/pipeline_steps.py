"""One step of a run: do it, count what is left, evaluate, judge its gates."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp import progress
from edgecomp.compress.macs import count_macs, count_parameters
from edgecomp.errors import ModelError
from edgecomp.graph import constants
from edgecomp.graph.batch import with_batch
from edgecomp.graph.fake_quant import fake_quantize
from edgecomp.parity import gates as gating
from edgecomp.parity.metric import Metric, infer
from edgecomp.parity.metric_named import by_name
from edgecomp.reference import TorchReference, flatten
from edgecomp.spec import Candidate, DataSource

_BATCH = 64
_SPARSE = 0.1
"""From this share of zeros on it is worth telling what compression makes of the weights."""


def metric_named(name: str | None) -> Metric | None:
    """The task metric of this name; None: the one that fits the data. Raises UnknownNameError."""
    return None if name is None else by_name(name)


@dataclass(frozen=True)
class Evaluation:
    """A metric's value over the evaluation data; `value` None where there are no targets."""

    name: str | None
    value: float | None
    higher_is_better: bool = True

    @property
    def metrics(self) -> dict[str, float]:
        return {} if self.name is None or self.value is None else {self.name: self.value}

    def drop(self, now: float | None) -> float | None:
        """What is lost from this value to another: positive is worse, in the metric's own unit."""
        if self.value is None or now is None:
            return None
        return self.value - now if self.higher_is_better else now - self.value


def evaluate(candidate: Candidate, source: DataSource, metric: Metric | None) -> Evaluation:
    """The candidate as its artifacts will compute it: quantized ones run fake-quantized.

    Raises ModelError when the module fails on the data, DataError when the metric does not fit.
    """
    run = runner(candidate, source)
    states: list[np.ndarray] = []
    total = -(-len(source) // _BATCH)
    for batch in progress.bar(source.batches(_BATCH), "evaluating", total):
        outputs = run(batch.inputs)
        metric = metric or infer(outputs, batch.targets)
        if metric is None or batch.targets is None:
            return Evaluation(None, None)
        states.append(metric.states(outputs, batch.targets))
    if metric is None or not states:
        return Evaluation(None, None)
    return Evaluation(metric.name, metric.value(np.concatenate(states)), metric.higher_is_better)


def runner(candidate: Candidate, source: DataSource) -> Any:
    """Arrays [N, ...] -> outputs [N, ...], N up to 64; whole batches where the module allows them."""
    plan = candidate.quantization
    if plan is not None:
        batched = with_batch(candidate.module, _BATCH)
        if batched is None:
            return TorchReference(fake_quantize(candidate.module, plan))
        return _padded(_together(fake_quantize(batched, plan)))
    alone, together = TorchReference(candidate.module), _together(candidate.module)
    batch = next(iter(source.batches(2)))
    try:
        found = together(batch.inputs)
    except (RuntimeError, ValueError, ModelError):
        return alone
    return together if _same(found, alone(batch.inputs)) else alone


def _same(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> bool:
    return all(
        f.shape == e.shape and np.allclose(f, e, rtol=1e-3, atol=1e-3 * (1 + float(np.abs(e).max())))
        for f, e in zip(found, expected, strict=True)
    )


def _together(module: nn.Module) -> Any:
    @torch.inference_mode()
    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in inputs]
        return [t.numpy() for t in flatten(module(*tensors))]

    return run


def _padded(run: Any) -> Any:
    """A graph of a fixed batch takes fewer samples too: the last one is repeated and cut off again."""

    def padded(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        size = len(inputs[0])
        full = [np.concatenate([a, np.repeat(a[-1:], _BATCH - size, axis=0)]) for a in inputs]
        return [o[:size] for o in run(full)]

    return padded


def count(candidate: Candidate) -> dict[str, Any]:
    """`params`, `nonzero_params`, `macs`, `size_bytes`, `compressed_bytes` of a candidate.

    A quantized candidate's parameters are its graph's constants, batch normalization folded in.
    `size_bytes`: parameters and buffers as stored; a quantized weight takes its bits, and 4 bytes for each
    scale. `compressed_bytes`: the same after zlib (deflate, as in a zip or an app package), where a tenth of
    the parameters or more is zero, else None. `macs`: one sample (see compress/macs.py).
    """
    tensors = _stored(candidate)
    if candidate.quantization is None:
        params, nonzero = count_parameters(candidate.module)
    else:
        values = [t for t in tensors.values() if t.is_floating_point()]
        params, nonzero = sum(t.numel() for t in values), sum(int(torch.count_nonzero(t)) for t in values)
    return {
        "params": params,
        "nonzero_params": nonzero,
        "macs": _macs(candidate),
        "size_bytes": sum(_bytes(candidate, n, t) for n, t in tensors.items()),
        "compressed_bytes": _compressed(candidate, tensors) if nonzero <= (1 - _SPARSE) * params else None,
    }


def _stored(candidate: Candidate) -> dict[str, Tensor]:
    """Name -> tensor, each once: the graph's constants, or the module's parameters and buffers."""
    module = candidate.module
    if candidate.quantization is not None:
        nodes = module.graph.find_nodes(op="get_attr")
        return {str(n.target): constants.value_of(module, n) for n in nodes if n.users}
    buffers = {n: b for n, b in module.named_buffers() if not n.endswith("num_batches_tracked")}
    return {**{n: p.detach() for n, p in module.named_parameters()}, **buffers}


def _bytes(candidate: Candidate, name: str, tensor: Tensor) -> int:
    plan = candidate.quantization
    if plan is None or name not in plan.weights:
        return tensor.numel() * tensor.element_size()
    weight = plan.weights[name]
    return -(-tensor.numel() * weight.spec.bits // 8) + 4 * int(weight.scale.size)


def _compressed(candidate: Candidate, tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors, one after the other, as one zlib stream; integers below 8 bits as bytes."""
    stream, total = zlib.compressobj(), 0
    for name, tensor in tensors.items():
        for part in _parts(candidate, name, tensor):
            total += len(stream.compress(np.ascontiguousarray(part).tobytes()))
    return total + len(stream.flush())


def _parts(candidate: Candidate, name: str, tensor: Tensor) -> list[np.ndarray]:
    plan = candidate.quantization
    if plan is None or name not in plan.weights or plan.weights[name].values is None:
        return [tensor.detach().contiguous().flatten().view(torch.uint8).numpy()]
    weight = plan.weights[name]
    return [np.asarray(weight.values, np.int8 if weight.spec.bits <= 8 else np.int16), weight.scale]


def _macs(candidate: Candidate) -> int | None:
    zeros = [torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in candidate.inputs]
    try:
        return count_macs(candidate.module, zeros)
    except (RuntimeError, TypeError) as error:
        progress.note(f"multiply-accumulates cannot be counted: {str(error).splitlines()[0]}")
        return None


def judge(
    gates: Sequence[str], facts: Mapping[str, Any], drops: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Gates of a step but those on a profile. Names: the metric, `drop`, `drop_previous`, params, macs,
    size_bytes, seconds."""
    numbers = {k: v for k, v in facts.items() if isinstance(v, int | float) or v is None}
    known = {**numbers, **facts["metrics"], **drops}
    return [gate.check(known) for gate in gating.parse_all(gates) if not gate.profiled]
