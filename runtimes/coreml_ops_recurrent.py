"""MIL's recurrent layers, step by step; equations from coremltools' `mil/ops/defs/iOS15/recurrent.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from edgecomp.runtimes.coreml_args import Table

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hard_sigmoid": lambda x: torch.clamp(0.2 * x + 0.5, 0.0, 1.0),
    "sigmoid_hard": lambda x: torch.clamp(0.2 * x + 0.5, 0.0, 1.0),
    "linear": lambda x: x,
    "relu": torch.relu,
    "scaled_tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _steps(x: Tensor, reverse: bool) -> Iterable[Tensor]:
    return reversed(x.unbind(0)) if reverse else x.unbind(0)


def _sequence(states: list[Tensor], reverse: bool, whole: bool) -> Tensor:
    """Hidden states [s, b, H] in the order of the input, or the final one [1, b, H]."""
    if not whole:
        return states[-1].unsqueeze(0)
    return torch.stack(states[::-1] if reverse else states)


def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Tensor | bool = False,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor]:
    h, states, function = initial_h, [], _ACTIVATIONS[activation]
    for step in _steps(x, direction == "reverse"):
        h = function(F.linear(step, weight_ih, bias) + F.linear(h, weight_hh))
        states.append(h)
    return _sequence(states, direction == "reverse", bool(output_sequence)), h


def gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Tensor | bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: Tensor | bool = False,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gates in the order reset, output, update.

    Default: o = activation(W_io x + r * (W_ho h) + b_o). With `reset_after` (iOS 18) the hidden bias is
    inside: o = activation(W_io x + b_io + r * (W_ho h + b_ho)), PyTorch's definition.
    """
    gate, output = _ACTIVATIONS[recurrent_activation], _ACTIVATIONS[activation]
    hidden = torch.zeros(weight_hh.shape[0]) if bias is None else bias
    bias_r, bias_o, bias_z = hidden.chunk(3)
    h, states, inside = initial_h, [], bool(reset_after)
    for step in _steps(x, direction == "reverse"):
        in_r, in_o, in_z = F.linear(step, weight_ih, input_bias).chunk(3, -1)
        hid_r, hid_o, hid_z = F.linear(h, weight_hh).chunk(3, -1)
        r, z = gate(in_r + hid_r + bias_r), gate(in_z + hid_z + bias_z)
        o = output(in_o + r * (hid_o + bias_o) if inside else in_o + r * hid_o + bias_o)
        h = (1 - z) * o + z * h
        states.append(h)
    return _sequence(states, direction == "reverse", bool(output_sequence)), h


def _lstm_one_way(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    reverse: bool,
    whole: bool,
    functions: tuple[Callable[[Tensor], Tensor], ...],
    clip: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates in the order input, forget, output, cell; peepholes input, forget, output."""
    gate, cell, output = functions
    peep_i, peep_f, peep_o = (0.0, 0.0, 0.0) if peephole is None else peephole.chunk(3)
    states = []
    for step in _steps(x, reverse):
        mixed = F.linear(step, weight_ih, bias) + F.linear(h, weight_hh)
        i, f, o, z = mixed.chunk(4, -1)
        i, f, z = gate(i + peep_i * c), gate(f + peep_f * c), cell(z)
        c = f * c + i * z
        c = c if clip is None else torch.clamp(c, -clip, clip)
        h = gate(o + peep_o * c) * output(c)
        states.append(h)
    return _sequence(states, reverse, whole), h, c


def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Tensor | bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Returns the hidden states, the final hidden state and the final cell state."""
    functions = tuple(_ACTIVATIONS[a] for a in (recurrent_activation, cell_activation, activation))
    whole = bool(output_sequence)
    if direction != "bidirectional":
        return _lstm_one_way(
            x, initial_h, initial_c, weight_ih, weight_hh, bias, peephole, direction == "reverse", whole,
            functions, clip,
        )  # fmt: skip
    h, h_back = initial_h.chunk(2, -1)
    c, c_back = initial_c.chunk(2, -1)
    ahead = _lstm_one_way(x, h, c, weight_ih, weight_hh, bias, peephole, False, whole, functions, clip)
    back = _lstm_one_way(
        x, h_back, c_back, weight_ih_back, weight_hh_back, bias_back, peephole_back, True, whole,  # type: ignore[arg-type]
        functions, clip,
    )  # fmt: skip
    return tuple(torch.cat(pair, -1) for pair in zip(ahead, back, strict=True))


OPS: Table = {"gru": gru, "lstm": lstm, "rnn": rnn}
