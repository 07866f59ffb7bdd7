"""Counting: multiply-accumulates, parameters and bytes of a module."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode


def count_macs(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Multiply-accumulates of one forward pass: convolutions, linear layers, matrix products, attention.

    Counted by torch's FlopCounterMode (two FLOPs each). Elementwise work and recurrent cells, which run as
    one fused operation, are not counted.
    """
    was_training = module.training and not isinstance(module, GraphModule)  # captured: no mode to change
    if was_training:
        module.eval()
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trained:  # the counter hooks on what it sees to need a gradient
            parameter.requires_grad_(False)
        with warnings.catch_warnings(), torch.no_grad(), FlopCounterMode(display=False) as counter:
            warnings.simplefilter("ignore")
            module(*inputs)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    if was_training:
        module.train()
    return int(counter.get_total_flops()) // 2


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(all, non-zero) values of the parameters; one shared by several modules counts once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(int(torch.count_nonzero(p)) for p in parameters)
