"""Slices, fairness, flips and corruptions."""

import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from edgecomp.adversarial import FastGradientSign
from edgecomp.calibration_data.audio import decode
from edgecomp.calibration_data.corruptions import PICTURES, PictureCorruptions, SoundCorruptions
from edgecomp.errors import DataError, UnknownNameError
from edgecomp.parity import compare, corrupted, flips, junit, slices
from edgecomp.parity.metric import Accuracy
from edgecomp.parity.observe import Observations, Side
from edgecomp.spec import Preprocessing

RNG = np.random.default_rng(8)


def observations(reference, test, groups, targets=None):
    sides = Side(states=[np.float64(reference)[:, None]]), Side(states=[np.float64(test)[:, None]])
    rows = [{"site": g} for g in groups]
    return Observations(Accuracy(), len(rows), sides[0], {"t": sides[1]}, {}, {}, {}, targets, rows)


def test_a_loss_in_one_slice_with_flat_accuracy_is_found():
    """900 of site a gain 4 points, 100 of site b lose 36: the sum is flat."""
    groups = ["a"] * 900 + ["b"] * 100
    reference, test = np.ones(1000), np.ones(1000)
    reference[:36] = 0
    test[900:936] = 0
    seen = observations(reference, test, groups)
    facts = slices.slice_figures(seen, "t", ["site"], ())
    assert reference.mean() == test.mean()
    assert facts["worst_slice"]["value"] == "b"
    assert facts["worst_slice"]["delta"] == pytest.approx(-0.36)
    assert facts["gaps"]["site"]["change"] == pytest.approx(0.36 - 0.04)
    assert slices.family_ends(facts["slices"])[1] < -0.2


def test_small_slices_are_listed_but_not_judged():
    reference, test = np.ones(110), np.ones(110)
    test[100:] = 0
    facts = slices.slice_figures(observations(reference, test, ["a"] * 100 + ["b"] * 10), "t", ["site"], ())
    assert [s["samples"] for s in facts["slices"]] == [100, 10]
    assert facts["worst_slice"]["value"] == "a" and facts["gaps"]["site"] is None


def test_classes_are_slices_with_their_labels():
    targets = np.repeat([0, 1, 2], 40)
    test = np.ones(120)
    test[:10] = 0
    seen = observations(np.ones(120), test, [""] * 120, targets)
    facts = slices.slice_figures(seen, "t", ["class"], ("cat", "dog"))
    assert [s["value"] for s in facts["slices"]] == ["cat", "dog", "2"]
    assert facts["worst_slice"]["delta"] == pytest.approx(-0.25)


def test_the_family_interval_is_wider_than_the_single_one():
    test = np.ones(200)
    test[::20] = 0
    seen = observations(np.ones(200), test, ["a", "b"] * 100)
    for entry in slices.slice_figures(seen, "t", ["site"], ())["slices"]:
        assert entry["family95"][0] < entry["ci95"][0] and entry["family95"][1] >= entry["ci95"][1]


def test_unknown_and_partly_missing_columns():
    seen = observations(np.ones(3), np.ones(3), ["a", "b", "c"])
    with pytest.raises(UnknownNameError, match="did you mean 'site'"):
        slices.slice_figures(seen, "t", ["sites"], ())
    seen.rows[1] = {}
    with pytest.raises(DataError, match="1 of 3 samples have no 'site'"):
        slices.slice_figures(seen, "t", ["site"], ())


def test_compare_fails_the_fairness_gate_and_lists_flips(linear, arrays_source):
    """The artifact's bias turns class 1 into class 0 for small inputs, which only group b has."""
    weight = np.array([[0.0, 0], [1, 1]])
    inputs = np.concatenate([RNG.uniform(1, 2, (900, 2)), RNG.uniform(0.2, 0.4, (100, 2))]).astype(np.float32)
    rows = [{"group": "a"}] * 900 + [{"group": "b"}] * 100
    source = arrays_source(inputs, np.ones(1000, int), ("no", "yes"), rows)
    entry = compare(
        lambda a: [(a[0] @ weight.T).astype(np.float32)],
        linear(weight, np.array([0.6, 0.0])),
        source,
        slices=["group"],
        gates=[
            "metric.delta.point >= -0.12",
            "worst_slice.delta >= -0.05",
            "worst_slice.delta.high >= -0.05",
        ],
    )
    assert [g["passed"] for g in entry["gates"]] == [True, False, False]
    examples = entry["flips"]["examples"]
    assert entry["flips"]["negative"] > len(examples) == flips.LISTED
    assert {e["row"]["group"] for e in examples} == {"b"}
    assert all(e["target"] == "yes" and e["artifact"] == "no" for e in examples)
    confidence = [e["artifact_confidence"] for e in examples]
    assert confidence == sorted(confidence, reverse=True)


# Inputs as files


@pytest.mark.parametrize("channels, layout", [(1, "NCHW"), (3, "NCHW"), (3, "NHWC")])
def test_png_is_read_back_by_pillow(tmp_path, channels, layout):
    pixels = RNG.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    how = Preprocessing(mean=(0.3,), std=(0.2,), layout=layout)
    sample = ((pixels / 255 - 0.3) / 0.2).astype(np.float32)
    sample = sample if layout == "NHWC" else sample.transpose(2, 0, 1)
    assert flips.write_input(sample, how, tmp_path / "f") == "f.png"
    with Image.open(tmp_path / "f.png") as image:
        np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)


def test_without_a_preprocessing_values_are_stretched():
    found = flips.to_pixels(np.linspace(-2, 2, 16).reshape(1, 4, 4), None)
    assert found.shape == (4, 4, 1) and found.min() == 0 and found.max() == 255
    assert flips.to_pixels(np.zeros(8), None) is None


def test_sounds_become_wav(tmp_path):
    sample = np.array([[0.5, -0.25, 0.0]], np.float32)
    how = Preprocessing(layout="NCW", rescale=1.0, sample_rate=8000)
    assert flips.write_input(sample, how, tmp_path / "f") == "f.wav"
    np.testing.assert_allclose(decode(tmp_path / "f.wav").T, sample, atol=1e-4)


def test_save_inputs_finds_samples_by_number(tmp_path, arrays_source):
    inputs = np.stack([np.full((1, 4, 4), i, np.float32) for i in range(70)])
    source = arrays_source(inputs)
    source.preprocessing = Preprocessing(rescale=1.0)
    saved = flips.save_inputs([{"index": 65}, {"index": 3}], source, tmp_path)
    assert [s["input"] for s in saved] == ["flip-65.png", "flip-3.png"]
    with Image.open(tmp_path / "flip-65.png") as image:
        assert np.asarray(image).max() == 65


# Corruptions

HOW = Preprocessing(mean=(0.4,), std=(0.25,))


def picture(side, channels=3):
    y, x = np.mgrid[0:side, 0:side] / side
    texture = np.random.default_rng(1).uniform(-0.2, 0.2, (side, side))
    unit = np.stack([(np.sin(6 * x + c) + np.cos(5 * y)) / 8 + 0.5 + texture for c in range(channels)])
    return ((np.rint(unit * 255) / 255 - 0.4) / 0.25).astype(np.float32)


@pytest.mark.parametrize("name", sorted(PICTURES))
@pytest.mark.parametrize("side", [32, 96])
def test_pictures_get_worse_with_severity_and_stay_in_range(name, side):
    sample, low_high = picture(side), HOW.exact_range()
    distance = []
    for severity in (1, 3, 5):
        found = PictureCorruptions()(sample, HOW, name, severity, np.random.default_rng(0))
        assert found.shape == sample.shape and found.dtype == np.float32
        assert found.min() >= low_high[0] - 1e-5 and found.max() <= low_high[1] + 1e-5
        distance.append(np.mean((found - sample) ** 2))
    assert 0 < distance[0] < distance[1] < distance[2]


def test_noise_has_the_published_strength():
    flat = np.zeros((3, 128, 128), np.float32) + np.float32((0.5 - 0.4) / 0.25)
    found = PictureCorruptions()(flat, HOW, "gaussian_noise", 1, np.random.default_rng(0))
    assert (found.std() * 0.25) == pytest.approx(0.08, rel=0.03)


def test_jpeg_is_pillows():
    sample = picture(96)
    found = PictureCorruptions()(sample, HOW, "jpeg_compression", 2, np.random.default_rng(0))
    pixels = np.rint((sample * 0.25 + 0.4) * 255).astype(np.uint8).transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=18)
    expected = (np.asarray(Image.open(stream)).transpose(2, 0, 1) / 255 - 0.4) / 0.25
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_sounds():
    how = Preprocessing(layout="NCW", rescale=1.0, sample_rate=8000)
    sample = np.sin(np.arange(4000) / 10)[None].astype(np.float32)
    noisy = SoundCorruptions()(sample, how, "white_noise", 2, np.random.default_rng(0))
    assert 10 * np.log10(np.mean(sample**2) / np.mean((noisy - sample) ** 2)) == pytest.approx(20, abs=0.3)
    fast = SoundCorruptions()(sample, how, "speed", 2, np.random.default_rng(0))
    np.testing.assert_allclose(fast[0, :3000], np.sin(np.arange(3000) * 1.1 / 10), atol=2e-3)


def test_the_ladder_sets_float_beside_artifact(linear, arrays_source):
    weight, bias = RNG.normal(size=(3, 4)), np.zeros(3)
    inputs = RNG.normal(size=(120, 4)).astype(np.float32)

    def reference(arrays):
        return [(arrays[0] @ weight.T).astype(np.float32)]

    source = arrays_source(inputs, reference((inputs,))[0].argmax(1))
    entry = compare(reference, linear(weight, bias), source, corruptions=["out_of_range"])
    rows = entry["corruptions"]
    assert [r["severity"] for r in rows] == [1, 3, 5]
    for row in rows:
        assert row["reference"] == 1  # a linear model does not mind
        assert row["excess_loss"] == pytest.approx(row["artifact_loss"] - row["reference_loss"])
    assert rows[0]["sqnr_db"] > rows[2]["sqnr_db"]
    assert entry["worst_corruption"]["excess_loss"] == max(r["excess_loss"] for r in rows)


def test_the_same_seed_gives_the_same_noise(arrays_source):
    source = arrays_source(np.stack([picture(16)] * 4))
    source.preprocessing = HOW
    changed = corrupted.corrupted(source, "shot_noise", 3)
    first, again = (np.concatenate([b.inputs[0] for b in changed.batches(s)]) for s in (2, 3))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])


def test_corruptions_that_are_unknown_or_do_not_apply(arrays_source):
    source = arrays_source(np.zeros((3, 4), np.float32))
    assert corrupted.names_for(source) == ["out_of_range"]
    with pytest.raises(UnknownNameError, match="did you mean 'contrast'"):
        corrupted.check(source, "contrst")
    with pytest.raises(DataError, match="does not apply"):
        corrupted.check(source, "contrast")


def test_fast_gradient_sign_by_hand(arrays_source):
    """Two logits w.x and -w.x: the loss of class 0 grows against w."""
    w = torch.tensor([1.0, -2.0])

    class Net(torch.nn.Module):
        def forward(self, x):
            y = x @ w
            return torch.stack([y, -y], dim=1)

    source = arrays_source(np.array([[0.3, 0.1], [0.2, 0.9]], np.float32), np.array([0, 1]))
    moved = next(FastGradientSign(source, Net(), 0.1).batches(2)).inputs[0]
    np.testing.assert_allclose(moved, [[0.2, 0.2], [0.3, 0.8]], atol=1e-6)
    with pytest.raises(DataError, match="class targets"):
        next(FastGradientSign(arrays_source(source.inputs), Net(), 0.1).batches(2))


# JUnit


def test_junit_xml(tmp_path):
    gates = [
        {"expr": "a > 1", "value": 2.0, "passed": True, "reason": None},
        {"expr": "b < 1 & c", "value": 3.0, "passed": False, "reason": 'b is "3"'},
    ]
    junit.write([{"path": "out/m.tflite", "target": "tflite-int8", "gates": gates}], tmp_path / "j.xml")
    root = ElementTree.parse(tmp_path / "j.xml").getroot()
    assert (root.get("tests"), root.get("failures")) == ("2", "1")
    suite = root.find("testsuite")
    assert suite.get("name") == "parity m.tflite"
    cases = suite.findall("testcase")
    assert cases[0].find("failure") is None
    assert cases[1].get("name") == "b < 1 & c" and cases[1].find("failure").get("message") == 'b is "3"'
