"""Every lowering against torch in float, and against the fake-quantized torch graph in integers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tflite_functions as functions
import torch
from tflite_support import check_float, check_integer
from torch import nn

ON_PICTURES = {
    "convolutions": functions.CONVOLUTIONS,
    "networks": functions.NETWORKS,
    "pools": functions.POOLS,
    "activations": functions.ACTIVATIONS,
    "arithmetic": functions.ARITHMETIC,
    "reductions": functions.REDUCTIONS,
    "moves": functions.MOVES,
    "float only": functions.FLOAT_ONLY,
}


@pytest.mark.parametrize("family", ON_PICTURES)
def test_float_file_computes_what_torch_computes(family: str, tmp_path: Path) -> None:
    check_float(ON_PICTURES[family], (functions.PICTURE,), tmp_path)


def test_float_file_on_positive_numbers_and_sequences(tmp_path: Path) -> None:
    check_float(functions.POSITIVE_ONLY, (functions.POSITIVE,), tmp_path)
    check_float(functions.SEQUENCES, (functions.SEQUENCE,), tmp_path)


@pytest.mark.parametrize("family", ON_PICTURES)
def test_int8_file_computes_the_fake_quantized_graph(family: str, tmp_path: Path) -> None:
    check_integer(ON_PICTURES[family], (functions.PICTURE,), tmp_path)


def test_int8_file_on_positive_numbers_and_sequences(tmp_path: Path) -> None:
    check_integer(functions.POSITIVE_ONLY, (functions.POSITIVE,), tmp_path)
    check_integer(functions.SEQUENCES, (functions.SEQUENCE,), tmp_path)


INDEXED = {
    "embedding": nn.Embedding(10, 6),
    "integer arithmetic": lambda i: i * 2 + 1,
    "floor division": lambda i: i // 2,
    "remainder": lambda i: i % 2,
    "comparison": lambda i: i == 4,
    "cumulative sum": lambda i: i.cumsum(1),
}


def test_integers_are_int32_and_exact(tmp_path: Path) -> None:
    opened = check_float({**INDEXED, "real product": lambda i: i * 0.5}, (functions.IDS,), tmp_path)
    assert [s.dtype for s in opened.inputs] == ["int32"]
    assert [s.dtype for s in opened.outputs][:3] == ["float32", "int32", "int32"]
    check_integer(INDEXED, (functions.IDS,), tmp_path)


def test_computed_indices(tmp_path: Path) -> None:
    reads = {
        "gather": lambda x, i: x.gather(1, i[..., None].expand(1, 3, 6) % 5),
        "index": lambda x, i: x[:, i[0]],
        "two indices": lambda x, i: x[0][i[0] % 5, i[0]],
    }
    check_float(reads, (functions.SEQUENCE, functions.IDS), tmp_path)


TRANSFORMER = torch.randn(1, 5, 8)


def test_a_transformer_layer_in_float(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
    check_float({"layer": layer}, (TRANSFORMER,), tmp_path)


def test_recurrent_networks(tmp_path: Path) -> None:
    lstm, gru = nn.LSTM(6, 5, batch_first=True), nn.GRU(6, 5, batch_first=True)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru = lstm, gru

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.lstm(x)[0], self.gru(x)[0]], -1)

    check_float({"both": Recurrent()}, (functions.SEQUENCE,), tmp_path)
    check_integer({"both": Recurrent()}, (functions.SEQUENCE,), tmp_path, steps=2)


def test_layer_norm_and_attention_in_16_bit_activations(tmp_path: Path) -> None:
    """Errors of single steps of 2^-15 add up over a dozen operations."""
    layer = nn.Sequential(nn.LayerNorm(8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    opened = check_integer({"layer": layer}, (TRANSFORMER,), tmp_path, bits=16, steps=40)
    assert {p.dtype for p in opened.placement()} <= {"int16", "int32"}


def test_16_bit_convolutions_and_activations(tmp_path: Path) -> None:
    check_integer(functions.CONVOLUTIONS, (functions.PICTURE,), tmp_path, bits=16, steps=2)
    known = {k: f for k, f in functions.ACTIVATIONS.items() if k != "log softmax"}
    check_integer(known, (functions.PICTURE,), tmp_path, bits=16, steps=4)
    check_integer(functions.ARITHMETIC, (functions.PICTURE,), tmp_path, bits=16, steps=2)
