"""A torch module -> the canonical ATen graph that every step after training works on."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from edgecomp.errors import ModelError
from edgecomp.graph import clean, decompose, fold


def capture(module: nn.Module, inputs: Sequence[Tensor]) -> GraphModule:
    """Export, decompose, fold and clean (see docs/architecture.md, 'The canonical graph').

    `inputs`: example tensors with the batch dimension first. The module itself is not changed.
    A module that is canonical already is copied. Raises ModelError when the module cannot be exported
    (data-dependent control flow) or holds NaN or Inf.
    """
    if isinstance(module, GraphModule) and module.meta.get("canonical"):
        return copy.deepcopy(module)
    check_finite(module)
    graph_module = _export(module, tuple(inputs))
    for simplify in _SIMPLIFICATIONS:
        simplify(graph_module)
        graph_module.graph.eliminate_dead_code()
    clean.refresh_shapes(graph_module, inputs)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    graph_module.meta["canonical"] = True
    return graph_module


_SIMPLIFICATIONS = (
    clean.lift_scalars,
    clean.normalize,
    clean.drop_no_ops,
    fold.fold_all,
    fold.fold_batch_norms,
    fold.fold_padding,
)


def _export(module: nn.Module, inputs: tuple[Tensor, ...]) -> GraphModule:
    module = copy.deepcopy(module).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            # A failed export prints the graph so far; the message below says what matters.
            with contextlib.redirect_stderr(io.StringIO()):
                program = torch.export.export(module, inputs, strict=False)
            program = program.run_decompositions(decompose.table())
        except Exception as error:
            raise ModelError(
                f"{type(module).__name__} cannot be captured by torch.export for inputs of shape "
                f"{[tuple(i.shape) for i in inputs]}: {_first_lines(error)}; rewrite data-dependent control "
                "flow, or give the shapes that the model expects"
            ) from error
        graph_module = program.module(check_guards=False)
    for parameter in graph_module.parameters():
        parameter.requires_grad_(False)
    for node in graph_module.graph.nodes:
        node.meta["module"] = _module_name(node)
    return graph_module


def _module_name(node: Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400] or type(error).__name__


def check_finite(module: nn.Module) -> None:
    """Raise ModelError, naming the tensor, when a parameter or a batch-norm statistic is NaN or Inf."""
    running = ((n, b) for n, b in module.named_buffers() if n.endswith(("running_mean", "running_var")))
    for name, tensor in [*module.named_parameters(), *running]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"weight {name!r} holds {bad} values that are NaN or Inf of {tensor.numel()}; the checkpoint "
                "is damaged or training diverged: load an earlier one"
            )
