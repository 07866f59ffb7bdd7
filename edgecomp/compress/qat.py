"""Quantization-aware training: weights, biases and scales trained together, then kept as the plan.

The graph is the canonical one, so batch normalization is folded and frozen. Scales are trained through their
logarithm, which keeps them positive and makes a step relative; gradients through the rounding are those of
Esser et al., "Learned Step Size Quantization", ICLR 2020, equations 1 to 3, as PyTorch computes them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from edgecomp.compress import plan, scales
from edgecomp.compress.distill_losses import logit_loss
from edgecomp.compress.fit import fit
from edgecomp.compress.observe import Observer
from edgecomp.compress.ptq import Quantize, example_inputs
from edgecomp.compress.rounding import Rounding
from edgecomp.compress.rules import Rule
from edgecomp.compress.training import Training, check, first_output, task_loss
from edgecomp.errors import DataError, ModelError
from edgecomp.graph import capture, constants
from edgecomp.graph.batch import with_batch
from edgecomp.graph.vocabulary import WEIGHTED
from edgecomp.numerics import affine
from edgecomp.spec import Candidate, Data, QuantizationPlan, StepRecord, TensorQuantization


@dataclass(frozen=True)
class QuantizeAwareTraining(Training):
    """Train with fake quantization; the trained scales reach every artifact as they are.

    `alpha`: share of the loss that is distillation (1: no labels are needed), the rest is the task's loss on
    labels. `teacher`: the float model that is quantized, or the `original` that the chain started from, which
    was not pruned. `loss`: regression on its outputs (Ba and Caruana, NeurIPS 2014), or logits softened by
    `temperature` (Hinton et al. 2015). Training starts from the ranges of post-training calibration
    (`observer`, `samples`). `rounding`, `equalize`, `rules`, `activation_sqnr_db` and `exclude` as in
    `quantize`; with another rounding than "nearest" the trained weights start from its integers.
    """

    epochs: int = 4
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    alpha: float = 0.5
    teacher: Literal["float", "original"] = "float"
    loss: Literal["regression", "logits"] = "regression"
    temperature: float = 4.0
    observer: Observer = "minmax"
    samples: int = 128
    weight_bits: int = 8
    activation_bits: int = 8
    rounding: Rounding = "nearest"
    equalize: float = 0.0
    rules: Mapping[str, Rule] = field(default_factory=dict)
    activation_sqnr_db: float | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check("alpha", self.alpha, 0 <= self.alpha <= 1, "a share from 0 to 1")
        check("teacher", self.teacher, self.teacher in ("float", "original"), "float or original")
        check("loss", self.loss, self.loss in ("regression", "logits"), "regression or logits")
        check("temperature", self.temperature, self.temperature > 0, "a positive number")
        self._calibration()

    def _calibration(self) -> Quantize:
        return Quantize(
            observer=self.observer,
            samples=self.samples,
            rounding=self.rounding,
            equalize=self.equalize,
            rules=self.rules,
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            activation_sqnr_db=self.activation_sqnr_db,
            exclude=self.exclude,
        )

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        """A candidate with trained weights and plan. Raises DataError without training data."""
        if candidate.quantization is not None:
            raise ModelError("step 'qat' comes after quantize, whose weights are fixed; leave quantize out")
        if data.train is None:
            raise DataError("step 'qat' needs training data: give the recipe `data: train:`, or --train")
        start = self._calibration()(candidate, data)
        if start.quantization is None:
            raise ModelError("calibration gave no plan; please report the model that did this")
        learner = trainable(start.module, start.quantization, self.rounding != "nearest")
        student = _Student(learner)
        notes = fit(student, data.train, self, self._objective(candidate))
        module, quantization = finished(start.module, student.graph_module, start.quantization)
        calibrated = start.history[-1].notes if self.activation_sqnr_db is not None else ()
        record = StepRecord("qat", "quantize", asdict(self), (*notes, *calibrated))
        history = (*candidate.history, record)
        return replace(start, module=module, quantization=quantization, history=history)

    def _objective(self, candidate: Candidate) -> Any:
        module = candidate.module
        if self.teacher == "original" and candidate.original is not None:
            module = candidate.original
        teacher = _Student(capture(module, example_inputs(candidate)))

        def objective(module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
            outputs = first_output(module, inputs)
            loss = torch.zeros(())
            if self.alpha > 0:
                with torch.no_grad():
                    wanted = first_output(teacher, inputs)
                loss = loss + self.alpha * self._distance(outputs, wanted)
            if self.alpha < 1:
                loss = loss + (1 - self.alpha) * task_loss(outputs, targets, self.label_smoothing)
            return loss

        return objective

    def _distance(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        if self.loss == "logits":
            return logit_loss(outputs, wanted, self.temperature)
        return nn.functional.mse_loss(outputs, wanted) / wanted.var().clamp_min(1e-12)


class _Student(nn.Module):
    """A canonical graph that takes batches of any size; all sizes share one set of parameters."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module
        self._by_size: dict[int, GraphModule] = {1: graph_module}

    def forward(self, *inputs: Tensor) -> Any:
        size = len(inputs[0])
        graph_module = self._by_size.get(size) or self._of_size(size)
        if graph_module is not None:
            return graph_module(*inputs)
        return torch.cat(
            [first_output(self.graph_module, tuple(i[k : k + 1] for i in inputs)) for k in range(size)]
        )

    def _of_size(self, size: int) -> GraphModule | None:
        found = with_batch(self.graph_module, size)
        if found is not None:
            # Not registered as a submodule: it shares every parameter of the one that is.
            self._by_size[size] = found
        return found


def trainable(
    graph_module: GraphModule, quantization: QuantizationPlan, from_integers: bool = False
) -> GraphModule:
    """A copy that learns: fake quantization at every scale of the plan, weights and biases as parameters.

    `from_integers`: weights start as the plan's integers stand for them, not as the graph's own values.
    """
    result = copy.deepcopy(graph_module)
    groups = scales.group(graph_module, _bits(quantization))
    steps: dict[str, Node] = {}
    for node in list(result.graph.nodes):
        if node.target in WEIGHTED and node.name not in quantization.float_nodes:
            _learn_layer(result, node, quantization, from_integers)
        q = quantization.activations.get(node.name)
        if q is not None and node.op != "get_attr":
            root = groups.find(node.name)
            _learn_output(result, node, q, root, steps, root in groups.prescribed)
    result.graph.lint()
    result.recompile()
    return result


def _bits(quantization: QuantizationPlan) -> int:
    return next((q.spec.bits for q in quantization.activations.values()), 8)


def _parameter(graph_module: GraphModule, name: str, value: Tensor, graph: Graph, learn: bool) -> Node:
    """A `get_attr` node at the place that `graph` inserts at."""
    if not hasattr(graph_module, name):
        graph_module.register_parameter(name, nn.Parameter(value.clone(), requires_grad=learn))
    node = graph.get_attr(name)
    node.meta = {"val": value, "module": ""}
    return node


def _label(name: str, kind: str) -> str:
    return f"{name.replace('.', '_')}__{kind}"


def _learn_layer(
    graph_module: GraphModule, layer: Node, quantization: QuantizationPlan, from_integers: bool
) -> None:
    name = str(layer.args[1].target)
    q = quantization.weights.get(name)
    if q is None:
        return
    value = constants.value_of(graph_module, layer.args[1])
    if from_integers and q.values is not None:
        value = torch.from_numpy(affine.dequantize(q.values, q))
    graph = graph_module.graph
    with graph.inserting_before(layer):
        weight = _parameter(graph_module, _label(name, "weight"), value, graph, True)
        step = torch.from_numpy(np.atleast_1d(q.scale)).log()
        scale = _exp(graph, _parameter(graph_module, _label(name, "step"), step, graph, True), step)
        rounded = _rounded(graph, weight, scale, q, value)
        layer.update_arg(1, rounded)
        if len(layer.args) > 2 and isinstance(layer.args[2], Node):
            bias = constants.value_of(graph_module, layer.args[2])
            layer.update_arg(2, _parameter(graph_module, _label(layer.name, "bias"), bias, graph, True))


def _exp(graph: Graph, step: Node, value: Tensor) -> Node:
    scale = graph.call_function(torch.exp, (step,))
    scale.meta = {"val": value.exp(), "module": ""}
    return scale


def _rounded(graph: Graph, node: Node, scale: Node, q: TensorQuantization, value: Tensor) -> Node:
    """PyTorch's learnable fake quantization; a scale's gradient is divided by sqrt(elements * levels)."""
    zeros = torch.from_numpy(np.atleast_1d(q.zero_point).astype(np.float32))
    owner = graph.owning_module
    name = _label(node.name, "zero_point")
    if not hasattr(owner, name):
        owner.register_buffer(name, zeros)
    zero = graph.get_attr(name)
    zero.meta = {"val": zeros, "module": ""}
    factor = 1.0 / math.sqrt(max(value.numel(), 1) * q.spec.qmax)
    arguments: tuple[Any, ...] = (node, scale, zero, q.spec.qmin, q.spec.qmax, factor)
    target: Any = torch._fake_quantize_learnable_per_tensor_affine
    if q.scale.ndim:
        target = torch._fake_quantize_learnable_per_channel_affine
        arguments = (node, scale, zero, q.spec.axis, q.spec.qmin, q.spec.qmax, factor)
    rounded = graph.call_function(target, arguments)
    rounded.meta = {"val": value, "module": node.meta.get("module", "")}
    return rounded


def _learn_output(
    graph_module: GraphModule,
    node: Node,
    q: TensorQuantization,
    root: str,
    steps: dict[str, Node],
    fixed: bool,
) -> None:
    """One step for all members of a scale group; a prescribed scale is not trained."""
    users, graph = list(node.users), graph_module.graph
    step = torch.from_numpy(np.atleast_1d(q.scale)).log()
    last = node
    with graph.inserting_after(last):
        parameter = _parameter(graph_module, _label(root, "step"), step, graph, not fixed)
    with graph.inserting_after(parameter):
        scale = _exp(graph, parameter, step)
    with graph.inserting_after(scale):
        marker = graph.call_function(torch.clone, (node,))
    with graph.inserting_before(marker):
        rounded = _rounded(graph, node, scale, q, node.meta["val"])
    graph.erase_node(marker)
    for user in users:
        user.replace_input_with(node, rounded)


def finished(
    graph_module: GraphModule, trained: GraphModule, quantization: QuantizationPlan
) -> tuple[GraphModule, QuantizationPlan]:
    """The canonical graph with trained weights and biases, and the plan with trained scales and integers."""
    module = copy.deepcopy(graph_module)
    groups = scales.group(graph_module, _bits(quantization))
    tensors = {n: p.detach() for n, p in trained.named_parameters()}
    activations = {
        name: _with_step(q, tensors.get(_label(groups.find(name), "step")))
        for name, q in quantization.activations.items()
    }
    weights: dict[str, TensorQuantization] = {}
    for name, layers in scales.weight_nodes(module).items():
        if name in quantization.weights:
            _keep_biases(module, layers, tensors)
            _keep_weight(module, name, layers, tensors, quantization.weights[name], activations, weights)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module, QuantizationPlan(activations, weights, quantization.float_nodes)


def _with_step(q: TensorQuantization, step: Tensor | None) -> TensorQuantization:
    if step is None:
        return q
    return replace(q, scale=step.exp().numpy().astype(np.float32).reshape(q.scale.shape))


def _keep_biases(module: GraphModule, layers: list[Node], tensors: Mapping[str, Tensor]) -> None:
    for layer in layers:
        bias = tensors.get(_label(layer.name, "bias"))
        if bias is not None:
            layer.update_arg(2, constants.add(module, f"{layer.name}_trained_bias", bias, layer))


def _keep_weight(
    module: GraphModule,
    name: str,
    layers: list[Node],
    tensors: Mapping[str, Tensor],
    q: TensorQuantization,
    activations: Mapping[str, TensorQuantization],
    weights: dict[str, TensorQuantization],
) -> None:
    """One trained weight for all layers that share it, stored before the first of them."""
    value = tensors[_label(name, "weight")]
    weight = constants.add(module, f"{name}_trained", value, layers[0])
    for layer in layers:
        layer.update_arg(1, weight)
    scale = plan.weight_scale(module, layers, activations, _with_step(q, tensors[_label(name, "step")]).scale)
    weights[str(weight.target)] = plan.round_to(value.numpy(), q.spec, scale)
