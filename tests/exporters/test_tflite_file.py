"""The emitter: versions, packing, alignment, clean-up, determinism."""

from __future__ import annotations

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgecomp.exporters import tflite_versions
from edgecomp.exporters.tflite_file import Draft, Op, Quant, Tensor, _stored, serialize


def _tensor(dtype: str, shape: tuple[int, ...] = (1, 4, 4, 8), channels: int = 1) -> Tensor:
    quant = (
        Quant(np.full(channels, 0.5, np.float32), np.zeros(channels, np.int64)) if "int" in dtype else None
    )
    return Tensor("t", shape, dtype, quant)


# Rows of LiteRT's op_version.cc.
VERSIONS = [
    ("CONV_2D", ["float32", "float32"], {}, 1),
    ("CONV_2D", ["int8", "int8"], {}, 3),
    ("CONV_2D", ["int16", "int8"], {}, 4),
    ("CONV_2D", ["int8", "int4"], {}, 7),
    ("DEPTHWISE_CONV_2D", ["float32", "float32"], {"dilationWFactor": 2}, 2),
    ("DEPTHWISE_CONV_2D", ["int8", "int8"], {}, 3),
    ("FULLY_CONNECTED", ["int8", "int8"], {}, 4),
    ("FULLY_CONNECTED", ["int8", "int8"], {"keepNumDims": True}, 5),
    ("FULLY_CONNECTED", ["float32", "int8"], {"asymmetricQuantizeInputs": True}, 9),
    ("ADD", ["float32", "float32"], {}, 1),
    ("ADD", ["int8", "int8"], {}, 2),
    ("SUB", ["int16", "int16"], {}, 5),
    ("MAX_POOL_2D", ["int8"], {}, 2),
    ("MEAN", ["int16"], {}, 3),
    ("RESHAPE", ["int8"], {}, 1),
    ("RESIZE_BILINEAR", ["int8"], {"halfPixelCenters": True}, 3),
    ("RESIZE_BILINEAR", ["int8"], {}, 2),
    ("SPLIT", ["int32", "int8"], {}, 2),
    ("TRANSPOSE", ["int8"], {}, 2),
    ("TANH", ["int16"], {}, 3),
    ("GELU", ["int8"], {}, 2),
    ("DEQUANTIZE", ["float16"], {}, 3),
]


@pytest.mark.parametrize(("code", "dtypes", "options", "version"), VERSIONS)
def test_version_covers_the_operands(code: str, dtypes: list[str], options: dict, version: int) -> None:
    op = Op(code, [_tensor(d) for d in dtypes], [_tensor(dtypes[0])], "", options)
    assert tflite_versions.of(op) == version


def test_versions_that_depend_on_scales_and_shapes() -> None:
    per_channel = [_tensor("float32"), _tensor("int8", channels=8)]
    assert tflite_versions.of(Op("CONV_2D", per_channel, [_tensor("float32")])) == 5
    assert tflite_versions.of(Op("FULLY_CONNECTED", per_channel, [_tensor("float32")])) == 12
    grouped = [_tensor("int8", (1, 4, 4, 8)), _tensor("int8", (6, 3, 3, 4))]
    assert tflite_versions.of(Op("CONV_2D", grouped, [_tensor("int8")])) == 6
    coarse = Tensor("out", (1,), "int8", Quant.of(0.25))
    assert tflite_versions.of(Op("MUL", [_tensor("int8"), _tensor("int8")], [coarse])) == 3
    assert tflite_versions.of(Op("TRANSPOSE", [_tensor("int8", (1, 2, 3, 4, 5, 6))], [coarse])) == 6


def test_four_bit_values_share_bytes_low_half_first() -> None:
    tensor = Tensor("w", (3,), "int4", None, np.array([1, -8, 7], np.int8))
    assert _stored(tensor) == bytes([0x81, 0x07])


@given(arrays.arrays(np.int8, st.integers(1, 40), elements=st.integers(-8, 7)))
def test_four_bit_values_are_what_the_runtime_unpacks(values: np.ndarray) -> None:
    packed = np.frombuffer(_stored(Tensor("w", values.shape, "int4", None, values)), np.uint8)
    halves = np.stack([packed & 0x0F, packed >> 4], 1).reshape(-1)[: values.size].astype(np.int8)
    np.testing.assert_array_equal(np.where(halves > 7, halves - 16, halves), values)


def _small_file() -> bytes:
    draft = Draft()
    x, y = Tensor("x", (1, 3), "float32"), Tensor("y", (1, 3), "float32")
    draft.emit("ADD", [x, draft.constant(np.array([1, 2, 3], np.float32), "c")], [y], "AddOptions")
    return serialize(draft, [("in", x)], [("out", y)], {"note": b"hello"})


def test_the_file_runs_and_names_its_signature() -> None:
    interpreter = Interpreter(model_content=_small_file())
    runner = interpreter.get_signature_runner("serving_default")
    np.testing.assert_array_equal(runner(**{"in": np.ones((1, 3), np.float32)})["out"], [[2, 3, 4]])


def test_the_same_draft_gives_the_same_bytes() -> None:
    assert _small_file() == _small_file()


def test_buffers_start_at_multiples_of_16() -> None:
    draft = Draft()
    x = Tensor("x", (1, 5), "float32")
    for i in range(3):
        y = Tensor(f"y{i}", (1, 5), "float32")
        x = draft.emit("ADD", [x, draft.constant(np.full(5, i + 0.5, np.float32), "c")], [y], "AddOptions")
    content = serialize(draft, [("in", draft.ops[0].inputs[0])], [("out", x)], {"a": b"xyz"})  # type: ignore[list-item]
    model = schema.Model.GetRootAs(content, 0)
    starts = []
    for i in range(model.BuffersLength()):
        table = model.Buffers(i)._tab
        if offset := table.Offset(4):
            starts.append(table.Vector(offset))
    assert len(starts) == 4
    assert all(s % 16 == 0 for s in starts)


def test_clean_merges_reshapes_and_drops_what_nobody_reads() -> None:
    draft = Draft()
    x = Tensor("x", (2, 6), "float32")
    shapes = [(3, 4), (12,), (2, 6)]
    last = x
    for i, shape in enumerate(shapes):
        numbers = draft.constant(np.array(shape, np.int32), "shape")
        last = draft.emit("RESHAPE", [last, numbers], [Tensor(f"r{i}", shape, "float32")], "ReshapeOptions")
    draft.emit("ABS", [x], [Tensor("unused", (2, 6), "float32")])
    y = draft.emit("NEG", [last], [Tensor("y", (2, 6), "float32")])
    draft.clean([y])
    assert [op.code for op in draft.ops] == ["NEG"]
    assert draft.ops[0].inputs == [x]


def test_an_output_that_is_a_reshape_stays() -> None:
    draft = Draft()
    x, y = Tensor("x", (6,), "float32"), Tensor("y", (6,), "float32")
    draft.emit("RESHAPE", [x, draft.constant(np.array([6], np.int32), "shape")], [y], "ReshapeOptions")
    draft.clean([y])
    assert [op.code for op in draft.ops] == ["RESHAPE"]


def test_a_field_that_the_options_lack_is_an_error() -> None:
    draft = Draft()
    x, y = Tensor("x", (6,), "float32"), Tensor("y", (6,), "float32")
    draft.emit("SOFTMAX", [x], [y], "SoftmaxOptions", gamma=1.0)
    with pytest.raises(AttributeError, match="SoftmaxOptions has no field 'gamma'"):
        serialize(draft, [("x", x)], [("y", y)], {})


def test_equal_scales_and_zero_points_are_stored_once() -> None:
    """Eight weights of 64 channels: one vector of 64 zeros (8 bytes each) instead of eight."""
    sizes = []
    for count in (1, 8):
        draft = Draft()
        x = made = Tensor("x", (1, 8), "int8", Quant.of(0.1))
        for i in range(count):
            quant = Quant(np.full(64, 0.1 + i, np.float32), np.zeros(64, np.int64), 0)
            weight = draft.constant(np.ones((64, 8), np.int8), f"w{i}", "int8", quant)
            made = Tensor(f"y{i}", (1, 64), "int8", Quant.of(0.2))
            draft.emit("FULLY_CONNECTED", [x, weight, None], [made], "FullyConnectedOptions")
        content = serialize(draft, [("x", x)], [("y", made)], {})
        sizes.append(len(content))
        graph = schema.ModelT.InitFromPackedBuf(content, 0).subgraphs[0]
        found = [t.quantization for t in graph.tensors if len(t.quantization.scale) == 64]
        assert len(found) == count
        assert all(q.zeroPoint.tolist() == [0] * 64 and q.scale[5] == q.scale[0] for q in found)
    scales, zeros, tables = 7 * 64 * 4, 7 * 64 * 8, 7 * 350
    assert sizes[1] - sizes[0] < scales + tables < scales + zeros
