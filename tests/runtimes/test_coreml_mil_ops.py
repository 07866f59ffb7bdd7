"""MIL operations that PyTorch models seldom give, against numbers worked out by hand or by NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_programs import save_program
from torch import Tensor, tensor
from torch.nn import functional as F

from edgecomp.exporters.coreml_toolkit import mb
from edgecomp.runtimes.coreml import CoreMLRuntime
from edgecomp.runtimes.coreml_ops import OPS

X = tensor([[1.0, -2.0, 3.0], [4.0, 0.0, -6.0]])
RAMP = tensor([[[0.0, 1.0]]])
NINES = tensor([[9.0], [9.0]])
ROWS = tensor([[2], [0]])
IMAGE = torch.arange(16.0).reshape(1, 1, 4, 4)


def _i(*values: int) -> Tensor:
    return tensor(values, dtype=torch.int32)


def _s(value: int | bool) -> Tensor:
    return tensor(value)


@pytest.mark.parametrize(
    ("op", "arguments", "expected"),
    [
        ("inverse", {"x": tensor([1.0, 3.0]), "epsilon": tensor(1.0)}, [0.5, 0.25]),
        ("log", {"x": tensor([0.0]), "epsilon": tensor(1.0)}, [0.0]),
        ("threshold", {"x": X[0], "alpha": tensor(0.5)}, [1.0, 0.5, 3.0]),
        ("floor_div", {"x": tensor([7.0, -7.0]), "y": tensor(2.0)}, [3.0, -4.0]),
        ("mod", {"x": tensor([7.0, -7.0]), "y": tensor(4.0)}, [3.0, 1.0]),
        ("logical_xor", {"x": tensor([True, True]), "y": tensor([True, False])}, [False, True]),
        ("clamped_relu", {"x": X[1], "alpha": tensor(0.5), "beta": tensor(2.0)}, [2.0, 0.0, -3.0]),
        ("linear_activation", {"x": X[0], "alpha": tensor(2.0), "beta": tensor(1.0)}, [3.0, -3.0, 7.0]),
        ("scaled_tanh", {"x": tensor([0.0]), "alpha": tensor(2.0), "beta": tensor(3.0)}, [0.0]),
        ("thresholded_relu", {"x": X[0], "alpha": tensor(1.0)}, [1.0, 0.0, 3.0]),
        ("softplus_parametric", {"x": torch.zeros(1, 1), "alpha": tensor([2.0]), "beta": tensor([3.0])},
         [[2 * np.log(2)]]),
        ("gelu", {"x": tensor([1.0]), "mode": "SIGMOID_APPROXIMATION"}, [1 / (1 + np.exp(-1.702))]),
        ("reduce_sum_square", {"x": X, "axes": _i(1)}, [14.0, 52.0]),
        ("reduce_log_sum", {"x": tensor([1.0, np.e - 1])}, 1.0),
        ("reduce_prod", {"x": X, "axes": _i(-1), "keep_dims": _s(True)}, [[-6.0], [0.0]]),
        ("reduce_max", {"x": X}, 4.0),
        ("cumsum", {"x": X[0], "axis": _s(0), "exclusive": _s(True)}, [0.0, 1.0, -1.0]),
        ("cumsum", {"x": X[0], "axis": _s(0), "reverse": _s(True)}, [2.0, 1.0, 3.0]),
        ("topk", {"x": X[0], "k": _s(2), "ascending": _s(True), "return_indices": _s(False)}, [-2.0, 1.0]),
        ("argsort", {"x": X[0], "ascending": _s(True)}, [1, 0, 2]),
        ("l2_norm", {"x": tensor([[[3.0]], [[4.0]]]), "epsilon": tensor(0.0)}, [[[0.6]], [[0.8]]]),
        ("reshape", {"x": X, "shape": _i(0, -1, 1)}, [[[1.0], [-2.0], [3.0]], [[4.0], [0.0], [-6.0]]]),
        ("flatten2d", {"x": X, "axis": _s(1)}, X.tolist()),
        ("reverse", {"x": X[0]}, [3.0, -2.0, 1.0]),
        ("reverse_sequence", {"x": X, "lengths": _i(2, 3), "seq_axis": _s(1), "batch_axis": _s(0)},
         [[-2.0, 1.0, 3.0], [-6.0, 0.0, 4.0]]),
        ("concat", {"values": [_i(1, 2), _i(3, 4)], "axis": _s(0), "interleave": _s(True)}, [1, 3, 2, 4]),
        ("slice_by_index", {"x": X, "begin": _i(0, -1), "end": _i(2, 0), "stride": _i(1, -2),
                            "begin_mask": tensor([True, False]), "end_mask": tensor([True, True])},
         [[3.0, 1.0], [-6.0, 4.0]]),
        ("slice_by_index", {"x": X, "begin": _i(-1, 0), "end": _i(0, 2),
                            "squeeze_mask": tensor([True, False])}, [4.0, 0.0]),
        ("slice_by_size", {"x": X, "begin": _i(0, -2), "size": _i(1, -1)}, [[-2.0, 3.0]]),
        ("slice_update", {"x": X[0], "update": tensor([7.0, 8.0]), "begin": _i(0), "end": _i(3),
                          "stride": _i(2)}, [7.0, -2.0, 8.0]),
        ("sliding_windows", {"x": _i(1, 2, 3, 4), "axis": _s(0), "size": _s(2), "stride": _s(2)},
         [[1, 2], [3, 4]]),
        ("pad", {"x": _i(1, 2, 3).float(), "pad": _i(2, 1), "mode": "reflect"},
         [3.0, 2.0, 1.0, 2.0, 3.0, 2.0]),
        ("gather", {"x": X, "indices": _i(-1)[0], "axis": _s(1)}, [3.0, -6.0]),
        ("gather", {"x": X, "indices": ROWS, "axis": _s(1), "batch_dims": _s(1)}, [[3.0], [4.0]]),
        ("gather_along_axis", {"x": X, "indices": ROWS, "axis": _s(1)}, [[3.0], [4.0]]),
        ("gather_nd", {"x": X, "indices": _i(1, 0, 0, 2).reshape(2, 2)}, [4.0, 3.0]),
        ("gather_nd", {"x": X, "indices": _i(1, 2).reshape(2, 1), "batch_dims": _s(1)}, [-2.0, -6.0]),
        ("scatter", {"data": torch.ones(3), "indices": _i(2, 2), "updates": tensor([5.0, 6.0])},
         [1.0, 1.0, 12.0]),
        ("scatter", {"data": torch.ones(3), "indices": _i(1), "updates": tensor([4.0]), "mode": "div"},
         [1.0, 0.25, 1.0]),
        ("scatter_along_axis", {"data": X, "indices": _i(0, 1).reshape(2, 1), "updates": NINES,
                                "axis": _s(1), "mode": "update"}, [[9.0, -2.0, 3.0], [4.0, 9.0, -6.0]]),
        ("scatter_along_axis", {"data": X, "indices": _i(0, 1).reshape(2, 1), "updates": NINES,
                                "axis": _s(1), "mode": "max"}, [[9.0, -2.0, 3.0], [4.0, 9.0, -6.0]]),
        ("scatter_nd", {"data": X, "indices": _i(0, 1, 1, 2).reshape(2, 2), "updates": tensor([1.0, 2.0]),
                        "mode": "sub"}, [[1.0, -3.0, 3.0], [4.0, 0.0, -8.0]]),
        ("scatter_nd", {"data": X, "indices": _i(1).reshape(1, 1), "updates": tensor([[1.0, 2.0, 3.0]]),
                        "mode": "mul"}, [[1.0, -2.0, 3.0], [4.0, 0.0, -18.0]]),
        ("non_zero", {"x": X}, [[0, 0], [0, 1], [0, 2], [1, 0], [1, 2]]),
        ("one_hot", {"indices": _i(1, 0), "one_hot_vector_size": _s(2), "axis": _s(0),
                     "on_value": tensor(5.0), "off_value": tensor(1.0)}, [[1.0, 5.0], [5.0, 1.0]]),
        ("fill", {"shape": _i(2, 1), "value": tensor(3.0)}, [[3.0], [3.0]]),
        ("fill_like", {"ref_tensor": X[:1], "value": tensor(2)}, [[2, 2, 2]]),
        ("range_1d", {"start": _s(1), "end": _s(7), "step": _s(3)}, [1, 4]),
        ("band_part", {"x": torch.ones(3, 3), "lower": _s(0), "upper": _s(1)},
         [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]),
        ("l2_pool", {"x": tensor([[[3.0, 4.0]]]), "kernel_sizes": _i(2), "pad_type": "valid"}, [[[5.0]]]),
        ("max_pool", {"x": IMAGE[0], "kernel_sizes": _i(3), "strides": _i(3), "pad_type": "same"},
         [[[1.0, 3.0], [5.0, 7.0], [9.0, 11.0], [13.0, 15.0]]]),
        ("avg_pool", {"x": tensor([[[2.0, 4.0, 6.0]]]), "kernel_sizes": _i(2), "pad_type": "same",
                      "exclude_padding_from_average": _s(True)}, [[[3.0, 5.0, 6.0]]]),
        ("avg_pool", {"x": tensor([[[2.0, 4.0, 6.0]]]), "kernel_sizes": _i(2), "pad_type": "same_lower"},
         [[[1.0, 3.0, 5.0]]]),
        ("crop", {"x": IMAGE, "crop_height": _i(1, 2), "crop_width": _i(0, 3)}, [[[[4.0]]]]),
        ("resize_bilinear", {"x": RAMP, "target_size_height": _s(1), "target_size_width": _s(5),
                             "sampling_mode": "UNALIGN_CORNERS"}, [[[0.0, 0.1, 0.5, 0.9, 1.0]]]),
        ("resize_bilinear", {"x": RAMP, "target_size_height": _s(1), "target_size_width": _s(5),
                             "sampling_mode": "OFFSET_CORNERS"}, [[[0.1, 0.3, 0.5, 0.7, 0.9]]]),
        ("resize_bilinear", {"x": RAMP, "target_size_height": _s(1), "target_size_width": _s(5)},
         [[[0.0, 0.4, 0.8, 1.0, 1.0]]]),
        ("resize_bilinear", {"x": RAMP, "target_size_height": _s(1), "target_size_width": _s(1),
                             "sampling_mode": "ALIGN_CORNERS"}, [[[0.5]]]),
        ("resize", {"x": RAMP, "shape": _i(1, 0, 4), "resized_dims": _s(2),
                    "interpolation_mode": "NEAREST_NEIGHBOR"}, [[[0.0, 0.0, 1.0, 1.0]]]),
        ("quantize", {"input": tensor([0.25, 0.35, 99.0]), "scale": tensor(0.1), "output_dtype": "int8",
                      "zero_point": tensor(3, dtype=torch.int8)}, [5, 7, 127]),
        ("dequantize", {"input": tensor([[1], [2]], dtype=torch.uint8), "scale": tensor([0.5, 2.0]),
                        "zero_point": tensor([1, 0], dtype=torch.uint8), "axis": _s(0)}, [[0.0], [4.0]]),
        ("resample", {"x": IMAGE, "coordinates": tensor([[[[1.5, 2.0], [9.0, 0.0]]]]),
                      "sampling_mode": "bilinear", "padding_mode": "constant", "padding_value": tensor(7.0),
                      "coordinates_mode": "unnormalized", "align_corners": _s(True)}, [[[[9.5, 7.0]]]]),
    ],
)  # fmt: skip
def test_by_hand(op: str, arguments: dict[str, Any], expected: Any) -> None:
    found = OPS[op](**arguments)
    np.testing.assert_allclose(found.numpy(), np.array(expected), rtol=1e-6, atol=1e-6)


def test_depth_and_batch_blocks_are_each_others_inverse() -> None:
    x = torch.arange(64.0).reshape(1, 4, 4, 4)
    deep = OPS["space_to_depth"](x=x, block_size=_s(2))
    assert deep.shape == (1, 16, 2, 2)
    # Depth first: channel 4 holds the pixel one to the right.
    assert deep[0, 4, 0, 0] == x[0, 0, 0, 1]
    assert torch.equal(OPS["depth_to_space"](x=deep, block_size=_s(2)), x)
    padding = _i(0, 2, 1, 1).reshape(2, 2)
    blocks = OPS["space_to_batch"](x=x, block_shape=_i(3, 2), paddings=padding)
    assert blocks.shape == (6, 4, 2, 3)
    assert torch.equal(OPS["batch_to_space"](x=blocks, block_shape=_i(3, 2), crops=padding), x)


@pytest.mark.parametrize(
    ("pad_type", "expected"), [("same", [3.0, 5.0, 3.0]), ("same_lower", [1.0, 3.0, 5.0])]
)
def test_same_padding_puts_the_odd_one_where_it_says(pad_type: str, expected: list[float]) -> None:
    x, ones = tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 2)
    assert OPS["conv"](x=x, weight=ones, pad_type=pad_type).flatten().tolist() == expected


def test_same_transposed_convolution_gives_stride_times_the_size() -> None:
    x, weight = torch.randn(1, 2, 5), torch.randn(2, 3, 3)
    found = OPS["conv_transpose"](x=x, weight=weight, pad_type="same", strides=_i(2))
    assert torch.equal(found, F.conv_transpose1d(x, weight, stride=2)[:, :, :10])


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_rnn_against_torch(direction: str) -> None:
    layer = torch.nn.RNN(3, 4, nonlinearity="relu")
    x, h = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    weights = dict(layer.named_parameters())
    found, last = OPS["rnn"](
        x=x, initial_h=h[0], weight_ih=weights["weight_ih_l0"], weight_hh=weights["weight_hh_l0"],
        bias=weights["bias_ih_l0"] + weights["bias_hh_l0"], output_sequence=_s(True), activation="relu",
        direction=direction,
    )  # fmt: skip
    expected, final = layer(x.flip(0) if direction == "reverse" else x, h)
    torch.testing.assert_close(found, expected.flip(0) if direction == "reverse" else expected)
    torch.testing.assert_close(last, final[0])


def _gates(matrix: Tensor, order: tuple[int, ...]) -> Tensor:
    parts = matrix.chunk(len(order))
    return torch.cat([parts[i] for i in order])


def test_gru_with_the_reset_gate_after_is_torchs() -> None:
    layer = torch.nn.GRU(3, 4)
    x, h = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    order = (0, 2, 1)  # torch: reset, update, new; MIL: reset, output, update
    named = {n.removesuffix("_l0"): _gates(p, order) for n, p in layer.named_parameters()}
    found, last = OPS["gru"](
        x=x, initial_h=h[0], weight_ih=named["weight_ih"], weight_hh=named["weight_hh"],
        bias=named["bias_hh"], input_bias=named["bias_ih"], reset_after=_s(True), output_sequence=_s(True),
    )  # fmt: skip
    expected, final = layer(x, h)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(last, final[0])


def test_gru_of_one_step_by_hand() -> None:
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    weight_hh = torch.cat([zero, one * 2, zero])  # only the output gate looks at h
    _, h = OPS["gru"](x=torch.zeros(1, 1, 1), initial_h=one, weight_ih=torch.zeros(3, 1), weight_hh=weight_hh)
    # r = z = sigmoid(0) = 1/2, o = tanh(1/2 * 2), h = o / 2 + 1 / 2
    assert h.item() == pytest.approx((np.tanh(1.0) + 1) / 2)


def test_bidirectional_lstm_is_torchs() -> None:
    layer = torch.nn.LSTM(3, 4, bidirectional=True)
    x, h, c = torch.randn(5, 2, 3), torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    order = (0, 1, 3, 2)  # torch: input, forget, cell, output; MIL: input, forget, output, cell
    p = {n: _gates(w, order) for n, w in layer.named_parameters()}
    found, last_h, last_c = OPS["lstm"](
        x=x, initial_h=torch.cat([h[0], h[1]], -1), initial_c=torch.cat([c[0], c[1]], -1),
        weight_ih=p["weight_ih_l0"], weight_hh=p["weight_hh_l0"], bias=p["bias_ih_l0"] + p["bias_hh_l0"],
        weight_ih_back=p["weight_ih_l0_reverse"], weight_hh_back=p["weight_hh_l0_reverse"],
        bias_back=p["bias_ih_l0_reverse"] + p["bias_hh_l0_reverse"], direction="bidirectional",
        output_sequence=_s(True),
    )  # fmt: skip
    expected, (final_h, final_c) = layer(x, (h, c))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(last_h, torch.cat([final_h[0], final_h[1]], -1))
    torch.testing.assert_close(last_c, torch.cat([final_c[0], final_c[1]], -1))


def test_lstm_peephole_and_clip_by_hand() -> None:
    zero = torch.zeros(1, 1)
    peephole, c = tensor([1.0, 0.0, 0.0]), torch.full((1, 1), 4.0)
    _, h, c = OPS["lstm"](
        x=torch.zeros(1, 1, 1), initial_h=zero, initial_c=c, weight_ih=torch.zeros(4, 1),
        weight_hh=torch.zeros(4, 1), bias=tensor([0.0, 0.0, 0.0, 100.0]), peephole=peephole, clip=tensor(2.5),
    )  # fmt: skip
    # c = clip(sigmoid(0) * 4 + sigmoid(1 * 4) * 1) = clip(2.98), h = sigmoid(0) * tanh(2.5)
    assert c.item() == 2.5
    assert h.item() == pytest.approx(np.tanh(2.5) / 2)


def test_branches_and_loops(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        total = mb.reduce_sum(x=x, axes=[0], keep_dims=False)
        positive = mb.greater(x=total, y=0.0)
        start = mb.cond(
            pred=positive, _true_fn=lambda: mb.mul(x=x, y=2.0), _false_fn=lambda: mb.sub(x=x, y=1.0)
        )
        _, result = mb.while_loop(
            _cond=lambda i, v: mb.less(x=i, y=3.0),
            _body=lambda i, v: (mb.add(x=i, y=1.0), mb.add(x=v, y=i)),
            loop_vars=(0.0, start),
        )
        return result

    x = np.array([1.0, 2.0], np.float32)
    session = CoreMLRuntime().open(save_program(build, [x], tmp_path / "m.mlpackage"))
    assert session.run([x])[0].tolist() == [5.0, 7.0]  # x * 2 + 0 + 1 + 2
    assert session.run([-x])[0].tolist() == [1.0, 0.0]  # x - 1 + 3
    assert {p.type for p in session.placement()} >= {"cond", "while_loop"}
