"""Golden samples: written beside the artifact, replayed, and a change is noticed."""

from dataclasses import replace

import numpy as np
import pytest

from edgecomp import golden, manifest, registry
from edgecomp.errors import ArtifactError, DataError
from edgecomp.spec import Artifact, Batch, TensorSpec


class Source:
    labels, preprocessing = (), None

    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return len(self.inputs)

    def batches(self, size, *, shuffle_seed=None):
        for start in range(0, len(self), size):
            yield Batch((self.inputs[start : start + size],))


class Doubling:
    """An artifact of batch 2 that doubles its input: int8 when the file says so, else float32."""

    name, version = "doubling", "1"
    offset = 0

    def open(self, path, *, threads=1, optimize=True):
        quantized = path.read_bytes() == b"int8"
        scale = {"dtype": "int8", "scale": 0.5, "zero_point": 1} if quantized else {}
        self.inputs = (TensorSpec("x", (2, 3), layout="NC", **scale),)
        self.outputs = (TensorSpec("y", (2, 3), layout="NC", **scale),)
        return self

    def run(self, arrays):
        x = arrays[0]
        if x.dtype == np.int8:
            return [((x.astype(np.int32) - 1) * 2 + 1 + self.offset).astype(np.int8)]
        return [x * 2 + np.float32(self.offset)]


@pytest.fixture
def artifact(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "load", lambda room, name: Doubling)
    monkeypatch.setattr(Doubling, "offset", 0)

    def make(content):
        path = tmp_path / "m.tflite"
        path.write_bytes(content)
        spec = TensorSpec("x", (2, 3))
        draft = Artifact(path, "tflite", "tflite-int8", (spec,), (spec,), "", 0)
        return manifest.describe(draft, path)

    return make


INPUTS = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)


def written(artifact, inputs=INPUTS):
    done = golden.record(artifact, Source(inputs), lambda a: [a[0] * 2])
    manifest.write(done)
    return done


def test_recorded_arrays_are_inputs_own_outputs_and_float_outputs(artifact):
    done = written(artifact(b"int8"))
    assert done.golden == "m.tflite.golden.npz"
    with np.load(done.path.parent / done.golden) as arrays:
        np.testing.assert_array_equal(arrays["input_0"], INPUTS[:4])
        np.testing.assert_array_equal(arrays["float_0"], INPUTS[:4] * 2)
        assert arrays["output_0"].dtype == np.int8
        np.testing.assert_array_equal((arrays["output_0"] - 1.0) / 2, np.rint(INPUTS[:4] / 0.5))


def test_same_arrays_give_the_same_bytes(artifact):
    done = written(artifact(b"int8"))
    first = golden.path_of(done.path).read_bytes()
    written(artifact(b"int8"))
    assert golden.path_of(done.path).read_bytes() == first


@pytest.mark.parametrize("content", [b"int8", b"float"])
def test_replay_passes_where_nothing_changed(artifact, content):
    result = golden.replay(written(artifact(content)).path)
    assert result["passed"] and result["samples"] == 4
    assert result["outputs"][0]["difference"] == 0


@pytest.mark.parametrize(
    "content, offset, passed", [(b"int8", 1, True), (b"int8", 2, False), (b"float", 0.1, False)]
)
def test_replay_allows_one_step_and_no_more(artifact, monkeypatch, content, offset, passed):
    path = written(artifact(content)).path
    monkeypatch.setattr(Doubling, "offset", offset)
    assert golden.replay(path)["passed"] is passed


def test_a_single_partial_batch_is_cut_to_whole_ones(artifact):
    done = written(artifact(b"int8"), INPUTS[:3])
    assert golden.replay(done.path)["samples"] == 2


def test_too_few_samples(artifact):
    with pytest.raises(DataError, match="golden samples need 2"):
        written(artifact(b"int8"), INPUTS[:1])


def test_damaged_golden_file(artifact):
    done = written(artifact(b"int8"))
    golden.path_of(done.path).write_bytes(b"no archive")
    with pytest.raises(ArtifactError, match="cannot be read"):
        golden.replay(done.path)


def test_no_golden_file(artifact):
    plain = artifact(b"int8")
    manifest.write(replace(plain, golden=None))
    with pytest.raises(ArtifactError, match="no golden samples"):
        golden.replay(plain.path)


def test_changed_artifact(artifact):
    done = written(artifact(b"int8"))
    done.path.write_bytes(b"float")
    with pytest.raises(ArtifactError, match="SHA-256"):
        golden.replay(done.path)
