"""ONNX targets: the canonical graph and the quantization plan, lowered node by node.

Written with `onnx.helper` rather than `torch.onnx.export`: the names of values are those of the graph, the
scales are the plan's, the opset is an old one, and the bytes depend on the candidate alone
(docs/decisions/onnx-lowering.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from torch.fx import GraphModule, Node

from edgecomp import files, manifest
from edgecomp.errors import ModelError, UnknownNameError, UnsupportedOpError
from edgecomp.exporters import onnx_quant, onnx_shape
from edgecomp.exporters.onnx_graph import IR_VERSION, OPSET, OPSET_16_BIT, Builder, rename_output
from edgecomp.exporters.onnx_ops import DTYPES, OPS
from edgecomp.graph import capture, constants
from edgecomp.spec import Artifact, Candidate, Data, Layout, Problem, QuantizationPlan, TensorSpec

_FAMILIES = (onnx_shape,)  # importing a family fills the table of lowerings

TARGETS = ("onnx-fp32", "onnx-qdq")
_EMPTY = QuantizationPlan({}, {})
_LAYOUTS: dict[int, Layout] = {4: "NCHW", 3: "", 2: "NC"}


@dataclass(frozen=True)
class OnnxExporter:
    """Exports to one ONNX target. `output_names`: in order; `output`, or `output_0` and so on, by default."""

    target: str = "onnx-qdq"
    output_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UnknownNameError("target", self.target, TARGETS)

    def problems(self, candidate: Candidate) -> list[Problem]:
        """Operations that ONNX cannot express, with the module each comes from."""
        if self.target == "onnx-qdq" and candidate.quantization is None:
            return [
                Problem("quantize", "", "the model has no quantization plan: quantize it first (--calib SRC)")
            ]
        found = []
        for node in _captured(candidate).graph.nodes:
            if node.op == "call_function" and node.target not in OPS:
                found.append(Problem(str(node.target), node.meta.get("module", ""), "no ONNX lowering"))
        return found

    def export(self, candidate: Candidate, data: Data, out: Path) -> Artifact:
        """Write the .onnx file and describe it. Raises UnsupportedOpError naming op and module."""
        problems = self.problems(candidate)
        if problems:
            listed = "; ".join(f"{p.op} in {p.module or 'the model'}: {p.reason}" for p in problems[:5])
            raise UnsupportedOpError(f"{self.target} cannot be exported: {listed}")
        graph_module = _captured(candidate)
        plan = candidate.quantization if self.target == "onnx-qdq" else None
        inputs, outputs = self._ends(candidate, graph_module)
        draft = manifest.draft(
            candidate, data, path=out, target=self.target, inputs=inputs, outputs=outputs,
            skipped=_skipped(graph_module, plan), made_with=("onnx",),
        )  # fmt: skip
        model = lower(graph_module, plan or _EMPTY, [i.name for i in inputs], [o.name for o in outputs])
        helper.set_model_props(model, {manifest.KEY: manifest.embedded(draft)})
        _check(model, out)
        with files.atomic(out) as temporary:
            temporary.write_bytes(model.SerializeToString(deterministic=True))
            return manifest.describe(draft, temporary)

    def _ends(
        self, candidate: Candidate, graph_module: GraphModule
    ) -> tuple[list[TensorSpec], list[TensorSpec]]:
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        given = [s.name for s in candidate.inputs]
        inputs = [_spec(n, p.meta["val"]) for n, p in zip(given, placeholders, strict=True)]
        results = _results(graph_module)
        plain = ["output"] if len(results) == 1 else [f"output_{i}" for i in range(len(results))]
        outputs = [_spec(n, r.meta["val"]) for n, r in zip(self.output_names or plain, results, strict=True)]
        return inputs, outputs


def _captured(candidate: Candidate) -> GraphModule:
    example = tuple(torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in candidate.inputs)
    return capture(candidate.module, example)


def _spec(name: str, value: torch.Tensor) -> TensorSpec:
    layout = _LAYOUTS.get(value.dim(), "") if value.is_floating_point() else ""
    return TensorSpec(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), layout)


def _results(graph_module: GraphModule) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(graph_module.graph.find_nodes(op="output")[0].args, found.append)
    return found


def _skipped(graph_module: GraphModule, plan: QuantizationPlan | None) -> list[Problem]:
    nodes = {n.name: n for n in graph_module.graph.nodes}
    reasons = plan.float_nodes.items() if plan else ()
    return [Problem(str(nodes[n].target), nodes[n].meta.get("module", ""), why) for n, why in reasons]


def lower(
    graph_module: GraphModule, plan: QuantizationPlan, inputs: Sequence[str], outputs: Sequence[str]
) -> onnx.ModelProto:
    """The ONNX model of a canonical graph with the plan's QDQ pairs; float at the door."""
    wide = any(q.spec.bits == 16 for q in plan.activations.values())
    b = Builder(OPSET_16_BIT if wide else OPSET)
    given = iter(inputs)
    for node in graph_module.graph.nodes:
        b.module = node.meta.get("module", "")
        if node.op == "placeholder":
            _finish(b, node, next(given), plan)
        elif node.op == "get_attr":
            _constant(b, graph_module, node, plan)
        elif node.op == "call_function":
            _call(b, graph_module, node, plan)
    b.module = ""
    results = _results(graph_module)
    for name, result in zip(outputs, results, strict=True):
        b.op("Identity", [b.take(result)], name=name)
    _drop_identities(b, set(outputs))
    return _model(b, graph_module, inputs, outputs, results)


def _finish(b: Builder, node: Node, value: str, plan: QuantizationPlan) -> None:
    q = plan.activations.get(node.name)
    b.names[node.name] = value if q is None else onnx_quant.round_value(b, value, node.name, q)


def _constant(b: Builder, graph_module: GraphModule, node: Node, plan: QuantizationPlan) -> None:
    value = constants.value_of(graph_module, node).detach().numpy()
    q = plan.activations.get(node.name)
    if q is not None:
        b.names[node.name] = onnx_quant.stored_constant(b, value, node.name, q)
    elif _is_read_as_float(node, plan):
        b.names[node.name] = b.constant(value, name=str(node.target))


def _is_read_as_float(node: Node, plan: QuantizationPlan) -> bool:
    """A weight or bias of integer layers only is stored by those layers."""
    return any(not (onnx_quant.is_integer_layer(plan, u) and node in u.args[1:3]) for u in node.users)


def _call(b: Builder, graph_module: GraphModule, node: Node, plan: QuantizationPlan) -> None:
    before = dict(b.names)
    if onnx_quant.is_integer_layer(plan, node):
        b.names.update(
            onnx_quant.layer_operands(
                b, node, plan, lambda n: constants.value_of(graph_module, n).detach().numpy()
            )
        )
    value = OPS[node.target](b, node)
    b.names = before
    if isinstance(value, list):
        b.names.update({f"{node.name}.{i}": v for i, v in enumerate(value)})
        return
    if node.name not in plan.activations and value not in b.initializers and value not in before.values():
        rename_output(b, value, node.name)
        value = node.name
    _finish(b, node, value, plan)


def _drop_identities(b: Builder, outputs: set[str]) -> None:
    """An output's name moves to the node that computes it, where that has no other reader."""
    readers: dict[str, int] = {}
    for node in b.nodes:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    makers = {o: n for n in b.nodes for o in n.output}
    for node in [n for n in b.nodes if n.op_type == "Identity" and n.output[0] in outputs]:
        source = node.input[0]
        if readers[source] == 1 and source in makers and source not in outputs:
            maker = makers[source]
            maker.output[list(maker.output).index(source)] = node.output[0]
            b.nodes.remove(node)


def _model(
    b: Builder, graph_module: GraphModule, inputs: Sequence[str], outputs: Sequence[str], results: list[Node]
) -> onnx.ModelProto:
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    graph = helper.make_graph(
        b.nodes,
        "edgecomp",
        [_info(n, p) for n, p in zip(inputs, placeholders, strict=True)],
        [_info(n, r) for n, r in zip(outputs, results, strict=True)],
        list(b.initializers.values()),
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", b.opset)],
        ir_version=IR_VERSION[b.opset],
        producer_name="edgecomp",
    )


def _info(name: str, node: Node) -> onnx.ValueInfoProto:
    value = node.meta["val"]
    return helper.make_tensor_value_info(name, DTYPES.get(value.dtype, TensorProto.FLOAT), list(value.shape))


def _check(model: onnx.ModelProto, out: Path) -> None:
    """ONNX's own checker and shape inference, before the file gets its name."""
    try:
        onnx.checker.check_model(model, full_check=model.ByteSize() < 2**30)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{out.name} is not valid ONNX: {first}; please report the model that did this"
        ) from error
