"""Reading packages: compressed weights bit for bit, states, damage, and operations that nobody knows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_programs import save_module, save_program, sqnr_db
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgecomp.errors import ArtifactError, DataError
from edgecomp.exporters.coreml_toolkit import Model_pb2, ct, mb, types
from edgecomp.runtimes import coreml_constexpr, coreml_values
from edgecomp.runtimes.coreml import CoreMLRuntime

_INDEX_DTYPES = {
    1: types.np_uint1_dtype, 2: types.np_uint2_dtype, 3: types.np_uint3_dtype, 4: types.np_uint4_dtype,
    6: types.np_uint6_dtype, 8: np.uint8,
}  # fmt: skip
RNG = np.random.default_rng(0)


def _decoded(build: Callable[[], Any], tmp_path: Path, target: str = "iOS18") -> np.ndarray:
    """What our executor makes of a compressed constant in a package that coremltools wrote."""

    def program(x: Any) -> Any:
        return mb.add(x=x, y=build())

    x = np.zeros(1, np.float16)
    session = CoreMLRuntime().open(
        save_program(program, [x], tmp_path / f"{target}.mlpackage", target=target)
    )
    return session.run([x])[0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_grouped_palettes_of_every_width(bits: int, tmp_path: Path) -> None:
    indices = RNG.integers(0, 1 << bits, (6, 5, 3))
    lut = RNG.normal(size=(3, 1, 1, 1 << bits, 1)).astype(np.float16)
    found = _decoded(
        lambda: mb.constexpr_lut_to_dense(indices=indices.astype(_INDEX_DTYPES[bits]), lut=lut), tmp_path
    )
    expected = np.stack([lut[row // 2, 0, 0, indices[row], 0] for row in range(6)])
    assert np.array_equal(found, expected.astype(found.dtype))


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_palettes_of_ios16(bits: int, tmp_path: Path) -> None:
    indices = RNG.integers(0, 1 << bits, 35)
    lut = RNG.normal(size=1 << bits).astype(np.float16)
    stream = "".join(format(i, f"0{bits}b")[::-1] for i in indices)
    packed = np.array(
        [int(stream[i : i + 8].ljust(8, "0")[::-1], 2) for i in range(0, len(stream), 8)], np.uint8
    )
    found = _decoded(
        lambda: mb.constexpr_lut_to_dense(indices=packed, lut=lut, shape=np.array([5, 7], np.uint32)),
        tmp_path,
        "iOS16",
    )
    assert np.array_equal(found, lut[indices].reshape(5, 7).astype(found.dtype))


@pytest.mark.parametrize("axis", [0, 1])
def test_vector_palettes(axis: int, tmp_path: Path) -> None:
    indices = RNG.integers(0, 4, (2, 3))
    lut = RNG.normal(size=(1, 1, 4, 2)).astype(np.float16)
    found = _decoded(
        lambda: mb.constexpr_lut_to_dense(
            indices=indices.astype(types.np_uint2_dtype), lut=lut, vector_axis=np.int32(axis)
        ),
        tmp_path,
    )
    expected = np.zeros((4, 3) if axis == 0 else (2, 6))
    for row, column, part in np.ndindex(2, 3, 2):
        place = (2 * row + part, column) if axis == 0 else (row, 2 * column + part)
        expected[place] = lut[0, 0, indices[row, column], part]
    assert np.array_equal(found, expected.astype(found.dtype))


def test_a_palette_of_int8_inside_a_palette(tmp_path: Path) -> None:
    """Palette entries int8 with a scale: followed to the end, as one constant feeds the other."""
    indices = RNG.integers(0, 16, (4, 6))
    entries = RNG.integers(-128, 128, (4, 1, 16, 1)).astype(np.int8)
    scale = RNG.uniform(0.01, 0.02, (4, 1, 1, 1)).astype(np.float16)

    def build() -> Any:
        lut = mb.constexpr_blockwise_shift_scale(data=entries, scale=scale)
        return mb.constexpr_lut_to_dense(indices=indices.astype(types.np_uint4_dtype), lut=lut)

    found = _decoded(build, tmp_path)
    lut = (entries.astype(np.float32) * scale.astype(np.float32)).astype(np.float16)
    expected = np.stack([lut[row, 0, indices[row], 0] for row in range(4)])
    assert np.array_equal(found, expected.astype(found.dtype))


def test_blocks_of_int4_with_offset(tmp_path: Path) -> None:
    data = RNG.integers(-8, 8, (4, 6))
    scale = RNG.uniform(0.5, 1, (2, 3)).astype(np.float16)
    offset = RNG.integers(-8, 8, (2, 3))
    found = _decoded(
        lambda: mb.constexpr_blockwise_shift_scale(
            data=data.astype(types.np_int4_dtype), scale=scale, offset=offset.astype(types.np_int4_dtype)
        ),
        tmp_path,
    )
    wide = np.kron(scale.astype(np.float32), np.ones((2, 2)))
    expected = ((data - np.kron(offset, np.ones((2, 2)))) * wide).astype(np.float16)
    assert np.array_equal(found, expected.astype(found.dtype))


def test_affine_and_cast_of_ios16(tmp_path: Path) -> None:
    data = RNG.integers(0, 256, (4, 6)).astype(np.uint8)
    scale, zero = RNG.uniform(0.5, 1, 6).astype(np.float16), RNG.integers(0, 256, 6).astype(np.uint8)
    found = _decoded(
        lambda: mb.constexpr_affine_dequantize(
            quantized_data=data, scale=scale, zero_point=zero, axis=np.int32(1)
        ),
        tmp_path,
        "iOS16",
    )
    expected = ((data.astype(np.float32) - zero) * scale.astype(np.float32)).astype(np.float16)
    assert np.array_equal(found, expected.astype(found.dtype))
    half = RNG.normal(size=12).astype(np.float16)
    assert np.array_equal(coreml_constexpr.cast(half, "fp32"), half.astype(np.float32))


def test_sparse_palettes(tmp_path: Path) -> None:
    """The example of coremltools' documentation: values 2.0 and 3.0 where the mask is 1."""
    mask = np.array([[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1], [0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]])
    nonzero = np.array([0, 1, 1, 0, 1, 1, 0, 0, 1])
    lut = np.array([2.0, 3.0], np.float16).reshape(1, 1, 2, 1)

    def build() -> Any:
        kept, values = mb.constexpr_lut_to_sparse(
            indices_mask=mask.astype(types.np_uint1_dtype),
            indices_nonzero_data=nonzero.astype(types.np_uint1_dtype),
            lut=lut,
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=kept)

    expected = np.zeros((4, 6))
    expected[mask == 1] = [2, 3, 3, 2, 3, 3, 2, 2, 3]
    assert np.array_equal(_decoded(build, tmp_path), expected)


def test_sparse_integers(tmp_path: Path) -> None:
    mask, data = np.array([[1, 0, 1], [0, 1, 1]]), np.array([10, 11, 3, 4], np.int8)
    scale = np.array([[0.5], [2.0]], np.float16)

    def build() -> Any:
        kept, values = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask.astype(types.np_uint1_dtype), nonzero_data=data, scale=scale
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=kept)

    assert _decoded(build, tmp_path).tolist() == [[5.0, 0.0, 5.5], [0.0, 6.0, 8.0]]


class _Counter(nn.Module):
    """Adds what it is given to a buffer, and returns the sum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x.to(torch.float16))
        return self.total * 1.0


def test_states_last_from_run_to_run(tmp_path: Path) -> None:
    module = _Counter()
    path = save_module(
        module, [torch.zeros(3)], tmp_path / "m.mlpackage",
        states=[ct.StateType(ct.TensorType(shape=(3,), dtype=np.float16), name="total")],
        compute_precision=ct.precision.FLOAT16,
    )  # fmt: skip
    session = CoreMLRuntime().open(path)
    x = np.array([1.0, 2.0, 3.0], np.float32)
    assert session.run([x])[0].tolist() == [1.0, 2.0, 3.0]
    assert session.run([x])[0].tolist() == [2.0, 4.0, 6.0]
    assert session.states["total"].tolist() == [2.0, 4.0, 6.0]
    session.reset_states()
    assert session.run([x])[0].tolist() == [1.0, 2.0, 3.0]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Path]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5))
    x = torch.randn(1, 3, 8, 8)
    path = tmp_path_factory.mktemp("net") / "net.mlpackage"
    return module, x, save_module(module, [x], path, compute_precision=ct.precision.FLOAT16)


def test_precisions(net: tuple[nn.Module, Tensor, Path]) -> None:
    """Float32 arithmetic on a float16 program leaves the rounding of weights, input and output only."""
    module, x, path = net
    reference = module(x).detach().numpy()
    half = CoreMLRuntime().open(path).tensors([x.numpy()])
    exact = CoreMLRuntime(precision="float32").open(path).tensors([x.numpy()])
    plain = CoreMLRuntime().open(path, optimize=False).tensors([x.numpy()])
    assert half.keys() == exact.keys() == plain.keys()
    name = CoreMLRuntime().open(path).outputs[0].name
    rounded = [k for k in half if not np.array_equal(half[k], exact[k])]
    assert rounded and all(np.array_equal(half[k], half[k].astype(np.float16)) for k in rounded)
    assert all(np.array_equal(plain[k], exact[k]) for k in plain)
    assert sqnr_db(reference, exact[name]) > sqnr_db(reference, half[name]) > 50


def test_placement_names_operations_with_their_types(net: tuple[nn.Module, Tensor, Path]) -> None:
    placed = CoreMLRuntime().open(net[2]).placement()
    assert [p.type for p in placed if p.type != "cast"] == ["conv", "relu", "conv", "reshape", "linear"]
    assert {p.dtype for p in placed if p.type == "conv"} == {"float16"}
    assert {p.placed_on for p in placed} == {"reference"}


def test_wrong_inputs_are_refused(net: tuple[nn.Module, Tensor, Path]) -> None:
    session = CoreMLRuntime().open(net[2])
    with pytest.raises(DataError, match="2 arrays given"):
        session.run([net[1].numpy()] * 2)
    with pytest.raises(DataError, match=r"has shape \(1, 3, 9, 8\)"):
        session.run([np.zeros((1, 3, 9, 8), np.float32)])
    with pytest.raises(ValueError, match="expected 'float16' or 'float32'"):
        CoreMLRuntime(precision="int8")  # type: ignore[arg-type]


def _copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy.mlpackage"))


def _model(package: Path) -> Path:
    return package / "Data" / "com.apple.CoreML" / "model.mlmodel"


def _weights(package: Path) -> Path:
    return package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"


def _edit(package: Path, change: Callable[[Any], None]) -> None:
    model = Model_pb2.Model.FromString(_model(package).read_bytes())
    change(model)
    _model(package).write_bytes(model.SerializeToString())


def test_unknown_operations_are_all_named_before_anything_runs(
    net: tuple[nn.Module, Tensor, Path], tmp_path: Path
) -> None:
    package = _copy(net[2], tmp_path)

    def rename(model: Any) -> None:
        block = next(iter(model.mlProgram.functions["main"].block_specializations.values()))
        for operation in block.operations:
            operation.type = {"relu": "teleport", "linear": "conjure"}.get(operation.type, operation.type)

    _edit(package, rename)
    with pytest.raises(ArtifactError, match=r"does not know: conjure \('.*'\), teleport \('.*'\)"):
        CoreMLRuntime().open(package)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: shutil.rmtree(p), "no Manifest.json"),
        (lambda p: (p / "Manifest.json").write_text("{"), "Manifest.json is damaged"),
        (lambda p: (p / "Manifest.json").write_text(json.dumps({"itemInfoEntries": {}})), "is damaged"),
        (lambda p: _model(p).unlink(), "cannot be parsed"),
        (lambda p: _model(p).write_bytes(b"\xff" * 100), "cannot be parsed"),
        (lambda p: _model(p).write_bytes(b""), "holds nothing; expected an ML program"),
        (lambda p: _weights(p).unlink(), "cannot be read"),
        (lambda p: _weights(p).write_bytes(_weights(p).read_bytes()[:-40]), "cut short"),
        (lambda p: _weights(p).write_bytes(b"\0" * 5000), "no tensor at offset"),
    ],
)
def test_damaged_packages(
    damage: Callable[[Path], Any], message: str, net: tuple[nn.Module, Tensor, Path], tmp_path: Path
) -> None:
    package = _copy(net[2], tmp_path)
    damage(package)
    with pytest.raises(ArtifactError, match=message):
        CoreMLRuntime().open(package)


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_no_byte_flip_escapes_as_another_error(
    data: st.DataObject, net: tuple[nn.Module, Tensor, Path], tmp_path: Path
) -> None:
    """A flipped byte gives an ArtifactError or another number, never a traceback of ours."""
    package = tmp_path / "flip.mlpackage"
    if not package.exists():
        shutil.copytree(net[2], package)
    file = data.draw(st.sampled_from([_model, _weights]))
    content = bytearray(file(net[2]).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file(package).write_bytes(bytes(content))
    try:
        session = CoreMLRuntime().open(package)
        session.run([np.zeros(i.shape, i.dtype) for i in session.inputs])
    except ArtifactError:
        pass
    finally:
        file(package).write_bytes(file(net[2]).read_bytes())


def test_neural_network_models_are_refused(net: tuple[nn.Module, Tensor, Path], tmp_path: Path) -> None:
    package = _copy(net[2], tmp_path)

    def empty(model: Any) -> None:
        model.neuralNetwork.SetInParent()

    _edit(package, empty)
    with pytest.raises(ArtifactError, match="holds neuralNetwork; expected an ML program"):
        CoreMLRuntime().open(package)


def test_types_of_unknown_dimensions() -> None:
    message = Model_pb2.Model().mlProgram.functions["main"].inputs.add()
    message.type.tensorType.dataType = 11
    message.type.tensorType.dimensions.add().constant.size = 2
    message.type.tensorType.dimensions.add().unknown.variadic = False
    assert coreml_values.type_of(message.type) == coreml_values.Type("float32", (2, -1))
