"""compare() over a runtime of known arithmetic, against figures computed directly."""

import json

import numpy as np
import pytest

from edgecomp import manifest
from edgecomp.cli.common import to_json
from edgecomp.errors import ArtifactError, DataError, InputError, UnknownNameError
from edgecomp.numerics import metrics
from edgecomp.parity import compare, document
from edgecomp.parity.entry import has_vnni
from edgecomp.spec import Artifact, TensorSpec

CONTRACT_KEYS = {
    "path", "target", "runtime", "samples", "top1_agreement", "sqnr_db", "cosine", "max_abs_error", "metric",
    "slices", "corruptions", "flips", "gates", "passed",
}  # fmt: skip


def by_hand(weight, bias, inputs):
    q = np.clip(np.rint(inputs / np.float32(0.05)) + 3, -128, 127)
    y = ((q - 3) * 0.05) @ weight.T + bias
    return (np.clip(np.rint(y / 0.1) - 2, -128, 127) + 2) * 0.1


def test_figures_are_those_computed_directly(linear, problem, arrays_source):
    weight, bias, inputs, reference = problem
    expected, found = reference((inputs,))[0], by_hand(weight, bias, inputs)
    targets = np.random.default_rng(1).integers(0, 3, len(inputs))
    entry = compare(reference, linear(weight, bias), arrays_source(inputs, targets), batch_size=77)
    assert set(entry) >= CONTRACT_KEYS
    assert entry["samples"] == 600
    assert entry["sqnr_db"] == pytest.approx(metrics.sqnr_db(expected, found), abs=1e-4)
    assert entry["cosine"] == pytest.approx(metrics.cosine(expected, found), abs=1e-6)
    assert entry["max_abs_error"] == pytest.approx(np.abs(expected - found).max(), abs=1e-6)
    assert entry["top1_agreement"] == np.mean(expected.argmax(1) == found.argmax(1))
    right = expected.argmax(1) == targets, found.argmax(1) == targets
    assert entry["metric"]["name"] == "accuracy"
    assert entry["metric"]["reference"] == pytest.approx(right[0].mean())
    assert entry["metric"]["delta"] == pytest.approx(right[1].mean() - right[0].mean())
    assert entry["flips"]["negative"] == np.sum(right[0] & ~right[1])
    assert entry["flips"]["positive"] == np.sum(~right[0] & right[1])
    low, high = entry["metric"]["ci95"]
    assert low < entry["metric"]["delta"] < high
    assert entry["passed"]


def test_calibration_of_both_sides(linear, problem, arrays_source):
    weight, bias, inputs, reference = problem
    targets = reference((inputs,))[0].argmax(1)
    entry = compare(reference, linear(weight, bias), arrays_source(inputs, targets))
    probability = metrics.softmax(reference((inputs,))[0])
    assert entry["calibration"]["reference"]["brier"] == pytest.approx(metrics.brier(probability, targets))
    ece = metrics.expected_calibration_error(probability, targets)
    assert entry["calibration"]["reference"]["ece"] == pytest.approx(ece)


def test_without_targets_nothing_is_invented(linear, problem, arrays_source):
    weight, bias, inputs, reference = problem
    entry = compare(reference, linear(weight, bias), arrays_source(inputs), gates=["metric.delta >= -0.1"])
    assert entry["metric"] is None and entry["calibration"] is None
    assert entry["flips"] == {"negative": None, "positive": None, "p_value": None, "examples": []}
    assert not entry["passed"]
    assert "not measured" in entry["gates"][0]["reason"]


def test_onnx_runs_as_written_and_optimized(linear, problem, arrays_source, monkeypatch):
    weight, bias, inputs, reference = problem
    monkeypatch.setattr("edgecomp.parity.entry.has_vnni", lambda: False)
    path = linear(weight, bias, ".onnx", gain=0.3)
    entry = compare(reference, path, arrays_source(inputs), gates=["sqnr_db > 20", "optimized.sqnr_db > 20"])
    assert "as written" in entry["runtime"]
    assert entry["sqnr_db"] > 25 > 10 > entry["optimized"]["sqnr_db"]
    assert entry["optimized"]["to_as_written"]["sqnr_db"] < 10
    assert [g["passed"] for g in entry["gates"]] == [True, False]
    assert len(entry["notes"]) == 1 and "VNNI" in entry["notes"][0]


def test_limit_takes_the_first_samples(linear, problem, arrays_source):
    weight, bias, inputs, reference = problem
    path = linear(weight, bias)
    entry = compare(reference, path, arrays_source(inputs), limit=50, batch_size=32)
    assert entry["samples"] == 50
    direct = metrics.sqnr_db(reference((inputs[:50],))[0], by_hand(weight, bias, inputs[:50]))
    assert entry["sqnr_db"] == pytest.approx(direct, abs=1e-4)


def test_regression_gets_rmse_with_a_bootstrap_interval(linear, arrays_source):
    inputs = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    weight = np.array([[1.0, 0.5, -0.5, 0.2]])
    targets = (inputs @ weight.T).astype(np.float32)[:, 0] + 0.3
    entry = compare(
        lambda a: [(a[0] @ weight.T).astype(np.float32)],
        linear(weight, np.zeros(1)),
        arrays_source(inputs, targets),
    )
    assert entry["metric"]["name"] == "rmse"
    assert entry["metric"]["reference"] == pytest.approx(0.3, abs=1e-5)
    assert entry["metric"]["ci95"][0] <= entry["metric"]["delta"] <= entry["metric"]["ci95"][1]
    assert entry["top1_agreement"] is None


def test_json_holds_the_entry(linear, problem, arrays_source):
    weight, bias, inputs, reference = problem
    entry = compare(reference, linear(weight, bias), arrays_source(inputs))
    facts = json.loads(to_json(document("model.py:net", [entry])))
    assert facts["reference"] == "model.py:net"
    assert facts["artifacts"][0]["samples"] == 600


def test_a_gate_that_cannot_be_read_fails_before_any_work(problem, tmp_path, arrays_source):
    with pytest.raises(InputError, match="not understood"):
        compare(problem[3], tmp_path / "missing.tflite", arrays_source(problem[2]), gates=["accuracy good"])


def test_unknown_gate_value_names_the_nearest(linear, problem, arrays_source):
    weight, bias, inputs, reference = problem
    with pytest.raises(UnknownNameError, match="top1_agreement"):
        compare(reference, linear(weight, bias), arrays_source(inputs), gates=["top1_agrement > 0.5"])


def test_missing_artifact_and_unknown_suffix(problem, tmp_path, arrays_source):
    with pytest.raises(ArtifactError, match="no artifact"):
        compare(problem[3], tmp_path / "missing.tflite", arrays_source(problem[2]))
    (tmp_path / "model.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"expected a \.tflite"):
        compare(problem[3], tmp_path / "model.txt", arrays_source(problem[2]))


def test_another_models_artifact_is_refused(linear, problem, arrays_source):
    weight, bias, inputs, reference = problem
    with pytest.raises(ArtifactError, match="not the same model"):
        compare(reference, linear(weight[:2], bias[:2]), arrays_source(inputs))


def test_wrong_input_shape_is_refused(linear, problem, arrays_source):
    weight, bias, inputs, _ = problem
    with pytest.raises(DataError, match="has shape"):
        compare(lambda a: [a[0][:, :3]], linear(weight, bias), arrays_source(np.zeros((4, 5), np.float32)))


def test_no_sample_is_refused(linear, problem, arrays_source):
    weight, bias, inputs, reference = problem
    with pytest.raises(DataError, match="no sample"):
        compare(reference, linear(weight, bias), arrays_source(inputs[:0]))


def test_labels_in_another_order_are_refused(linear, problem, arrays_source):
    weight, bias, inputs, reference = problem
    path = linear(weight, bias)
    spec = TensorSpec("x", (1, 4))
    artifact = Artifact(path, "tflite", "tflite-int8", (spec,), (spec,), "", 0, labels=("a", "b", "c"))
    manifest.write(manifest.describe(artifact, path))
    with pytest.raises(DataError, match="class 1 is 'b' and 'c'"):
        compare(reference, path, arrays_source(inputs, np.zeros(600, int), ("a", "c", "b")))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("flags\t: fpu avx2", False),
        ("flags : avx512_vnni", True),
        ("flags : avx_vnni", True),
        ("Features : asimd", True),
    ],
)
def test_vnni_is_read_from_cpuinfo(tmp_path, text, expected):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{text}\n")
    assert has_vnni(tmp_path / "cpuinfo") is expected
