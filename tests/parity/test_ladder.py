"""The stage ladder on real exports: sound ones pass, planted faults are named by rung and by layer."""

import json
from dataclasses import replace

import numpy as np
import planted_faults
import pytest
import torch
from click.testing import CliRunner

from edgecomp import checkpoint, ladder, ladder_local, ladder_stages
from edgecomp.calibration_data.sample import fashion_test
from edgecomp.cli import main
from edgecomp.compress.ptq import Quantize
from edgecomp.devices.fake import FakeDevice
from edgecomp.devices.local import LocalDevice
from edgecomp.errors import ArtifactError, DeviceError, ModelError
from edgecomp.exporters.onnx import OnnxExporter

SAMPLES = 64


def climb(candidate, path):
    return ladder.climb(candidate, path, fashion_test(), limit=SAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", planted_faults.FAULTS)
def test_a_planted_fault_is_named(name, tmp_path):
    fault = planted_faults.FAULTS[name]
    blamed = climb(*fault.plant(tmp_path))["blamed"]
    assert blamed is not None
    assert blamed["rung"] == fault.rung, blamed
    if fault.modules:
        assert blamed["module"] in fault.modules or blamed["node"] in fault.modules, blamed


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    candidate = planted_faults.quantized()
    return candidate, planted_faults.export(candidate, tmp_path_factory.mktemp("sound"))


def test_a_sound_export_is_not_blamed(sound):
    report = climb(*sound)
    assert report["blamed"] is None
    assert [r["name"] for r in report["rungs"]] == ["folded", "fake-quantized", "exported", "deploy kernels"]
    assert all(r["passed"] for r in report["rungs"])
    by_name = {r["name"]: r for r in report["rungs"]}
    assert by_name["folded"]["sqnr_db"] > by_name["fake-quantized"]["sqnr_db"] > 15
    assert by_name["exported"]["to_plan_db"] > 30


def test_weights_by_hand():
    """Rounded to nearest, batch norm folded by hand."""
    plain = planted_faults.floating()
    candidate = Quantize(samples=8, rounding="nearest")(plain, planted_faults.DATA)
    found = {e["node"]: e for e in ladder_stages.weight_errors(candidate.module, candidate.quantization)}
    weight = plain.module.net.stem[0].weight.detach().numpy()
    norm = plain.module.net.stem[1]
    scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().numpy()
    folded = weight * scale[:, None, None, None]
    steps = np.abs(folded).max(axis=(1, 2, 3), keepdims=True) / 127
    rounded = np.rint(folded / steps) * steps
    expected = 10 * np.log10((folded**2).sum() / ((folded - rounded) ** 2).sum())
    assert found["conv2d"]["sqnr_db"] == pytest.approx(expected, abs=0.05)
    assert found["conv2d"]["reachable_db"] == pytest.approx(expected, abs=0.05)
    assert found["conv2d"]["module"] == "net.stem.0"


def test_layers_have_weights_and_activations_apart(sound):
    rows = {r["node"]: r for r in climb(*sound)["layers"]}
    first = rows["conv2d"]
    assert first["module"] == "net.stem.0" and first["weight_db"] > 40
    assert 0 < first["x86_saturation"] < 0.5
    assert first["activation_db"] is None  # computed inside its ReLU6
    assert rows["hardtanh"]["module"] == "net.stem.2" and rows["hardtanh"]["activation_db"] > 30
    assert all(r["complaint"] is None for r in rows.values())


def test_float_artifacts_and_onnx_are_not_blamed(sound, tmp_path):
    candidate = planted_faults.floating()
    path = planted_faults.export(candidate, tmp_path, "tflite-fp32")
    assert climb(candidate, path)["blamed"] is None
    onnx = tmp_path / "net.onnx"
    OnnxExporter("onnx-qdq").export(sound[0], planted_faults.DATA, onnx)
    report = ladder.climb(sound[0], onnx, fashion_test(), limit=8)
    assert [b for b in report["all_blamed"] if b["rung"] != "deploy kernels"] == []
    assert any(r["local_db"] is not None for r in report["layers"])


def test_an_integer_file_without_its_plan_is_judged_by_its_noise(sound, tmp_path):
    plain = planted_faults.floating()
    assert climb(plain, sound[1])["blamed"] is None
    _, path = planted_faults.FAULTS["swapped axes"].plant(tmp_path)
    blamed = climb(plain, path)["blamed"]
    assert blamed["rung"] == "exported" and blamed["module"] == "net.stem.2"


def test_a_device_that_computes_otherwise_is_a_rung(sound):
    class Phone(LocalDevice):
        def pull(self, source, destination):
            rng = np.random.default_rng(0)
            with np.load(source) as found:
                changed = {n: rng.integers(-128, 128, found[n].shape, dtype=np.int8) for n in found.files}
            np.savez(destination, **changed)

    report = ladder.climb(*sound, fashion_test(), limit=SAMPLES, devices=[Phone("phone")])
    assert report["rungs"][-1]["name"] == "phone" and not report["rungs"][-1]["passed"]
    assert report["blamed"]["rung"] == "phone" and not report["blamed"]["sure"]


def test_this_machine_as_a_device_repeats_the_deploy_kernels(sound):
    report = ladder.climb(*sound, fashion_test(), limit=SAMPLES, devices=[LocalDevice("here")])
    rungs = {r["name"]: r for r in report["rungs"]}
    assert report["blamed"] is None
    assert rungs["here"]["sqnr_db"] == pytest.approx(rungs["deploy kernels"]["sqnr_db"], abs=1e-9)


def test_a_device_that_refuses_says_why(sound):
    device = FakeDevice(name="board", exit_code=3, events=[{"event": "refused", "message": "no runtime"}])
    with pytest.raises(DeviceError, match=r"device 'board' did not run net\.tflite .*no runtime"):
        ladder.climb(*sound, fashion_test(), limit=4, devices=[device])


def test_what_cannot_be_climbed(sound, tmp_path):
    with pytest.raises(ModelError, match="float original"):
        climb(replace(sound[0], original=None), sound[1])
    with pytest.raises(ArtifactError, match="no artifact"):
        climb(sound[0], tmp_path / "missing.tflite")


def test_command(sound, tmp_path):
    candidate, path = sound
    checkpoint.save(candidate, checkpoint.Origin(f"{planted_faults.__file__}:Classifier"), tmp_path / "q.pt")
    words = ["parity", str(tmp_path / "q.pt"), str(path), "--limit", "16", "--ladder"]
    words += ["--data", "edgecomp.calibration_data.sample:fashion_test"]
    shown = CliRunner().invoke(main, words)
    assert shown.exit_code == 0, shown.stderr
    assert "fake-quantized" in shown.stdout and "on own inputs" in shown.stdout
    facts = json.loads(CliRunner().invoke(main, [*words, "--json", "-"]).stdout)
    assert len(facts["artifacts"][0]["ladder"]["rungs"]) == 4


# The parts


def test_reachable_by_hand():
    """Two channels of [1, 0.3]: step 1/127, so 0.3 is 38.1 steps and is off by 0.1 of one, twice."""
    weight = np.array([[1.0, 0.3], [1.0, 0.3]])
    quantization = planted_faults.quantized().quantization.weights
    spec = next(iter(quantization.values()))
    expected = 10 * np.log10(2 * 1.09 / (2 * (0.1 / 127) ** 2))
    assert ladder_stages.reachable_db(weight, spec, 0) == pytest.approx(expected, abs=1e-6)


def tally(step=0.5):
    return ladder_local.LayerTally("n", "m", "conv2d", step, 0)


def framed(values):
    inner = values[:, :, 1:-1, 1:-1]
    return np.pad(inner, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=9)


@pytest.mark.parametrize(
    "error, words",
    [
        (lambda e: e, None),
        (lambda e: e + 0.5, "zero point is wrong"),
        (lambda e: e + 0.2, "do not lie on the plan's grid"),
        (lambda e: e + np.arange(4).reshape(1, 4, 1, 1) * 2, "bias"),
        (
            lambda e: np.pad(e[:, :, 1:-1, 1:-1], ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=9),
            "padding",
        ),
    ],
)
def test_patterns_of_error(error, words):
    expected = np.rint(np.random.default_rng(0).normal(size=(1, 4, 16, 16)) * 4) * 0.5
    seen = tally()
    seen.add(error(expected), expected, (-128, 127))
    complaint = seen.complaint(1e-3)
    assert complaint is None if words is None else words in complaint


def test_rounding_of_single_values_is_no_fault():
    expected = np.zeros((1, 1000))
    found = expected.copy()
    found[0, ::7] = 0.5
    seen = tally()
    seen.add(found, expected, (-128, 127))
    assert seen.complaint(1e-3) is None and seen.bias_steps == pytest.approx(1 / 7, abs=0.01)


def test_messages_name_the_only_node_of_an_operation(sound):
    graph = sound[0].module
    assert ladder.named_in("Node number 25 (SOFTMAX) failed to prepare", graph)[0] == "softmax"
    assert ladder.named_in("Node number 3 (CONV_2D) failed to prepare", graph) == (None, None)
