"""Counting: multiply-accumulates, parameters and bytes of a module."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

_FUSED = torch.ops.aten.mkldnn_rnn_layer
"""A layer of an LSTM in one direction, as CPUs run it without gradients."""


def count_macs(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Multiply-accumulates of one forward pass: convolutions, linear layers, matrix products, attention.

    Counted by torch's FlopCounterMode (two FLOPs each), also where an LSTM runs as one fused operation.
    Elementwise work is not counted.
    """
    was_training = module.training and not isinstance(module, GraphModule)  # captured: no mode to change
    if was_training:
        module.eval()
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trained:  # the counter hooks on what it sees to need a gradient
            parameter.requires_grad_(False)
        counter = FlopCounterMode(display=False, custom_mapping={_FUSED: _of_fused_layer})
        with warnings.catch_warnings(), torch.no_grad(), counter:
            warnings.simplefilter("ignore")
            module(*inputs)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    if was_training:
        module.train()
    return int(counter.get_total_flops()) // 2


def _of_fused_layer(inputs: Any, weights: Any, recurrent: Any, *_: Any, **__: Any) -> int:
    """FLOPs from the shapes of its inputs [T, N, C] and weights [4 H, C] and [4 H, H]."""
    times, samples, _ = inputs
    return 2 * int(times) * int(samples) * int(weights[0] * weights[1] + recurrent[0] * recurrent[1])


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(all, non-zero) values of the parameters; one shared by several modules counts once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(int(torch.count_nonzero(p)) for p in parameters)
