"""The data audit: each planted fault is found, sound data is left alone."""

import numpy as np
import pytest
from click.testing import CliRunner

from edgecomp.audit import audit, roughness
from edgecomp.cli import main
from edgecomp.errors import DataError
from edgecomp.spec import Batch, Preprocessing

# Smooth pictures in [0, 1], as photographs are.
RNG = np.random.default_rng(2)
HOW = Preprocessing(size=(16, 16))


def smooth(count, seed=0):
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 6, (count, 3, 1, 1))
    y, x = np.mgrid[0:16, 0:16] / 16
    waves = np.sin(phase + rng.uniform(1, 4, (count, 3, 1, 1)) * x + rng.uniform(1, 4, (count, 3, 1, 1)) * y)
    return ((waves + 1) / 2).astype(np.float32)


class Source:
    def __init__(self, inputs, targets=None, labels=(), how=None):
        self.inputs, self.targets, self.labels, self.preprocessing = inputs, targets, labels, how

    def __len__(self):
        return len(self.inputs)

    def batches(self, size, *, shuffle_seed=None):
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            if not np.isfinite(self.inputs[part]).all():
                raise DataError("sample 3 holds NaN")
            yield Batch((self.inputs[part],), None if self.targets is None else self.targets[part])


def checks(report, level=None):
    return {f["check"] for f in report["findings"] if level in (None, f["level"])}


def test_sound_data_has_no_finding():
    targets = np.arange(200) % 4
    report = audit(Source(smooth(200), targets, ("a", "b", "c", "d"), HOW))
    assert report["findings"] == [] and report["fit"]
    assert report["samples"] == report["distinct"] == 200
    assert report["classes"] == {"0": 50, "1": 50, "2": 50, "3": 50}


def test_few_samples():
    assert checks(audit(Source(smooth(20), how=HOW))) == {"samples"}


def test_copies():
    some = audit(Source(np.concatenate([smooth(150), smooth(150)[:30]]), how=HOW))
    assert checks(some, "warning") == {"duplicates"} and some["fit"]
    most = audit(Source(np.concatenate([smooth(30)] * 5), how=HOW))
    assert checks(most, "error") == {"duplicates"} and not most["fit"]


def test_classes():
    labels = ("a", "b", "c")
    missing = audit(Source(smooth(200), np.arange(200) % 2, labels, HOW))
    assert "c" in missing["findings"][0]["message"] and checks(missing, "warning") == {"classes"}
    only = audit(Source(smooth(200), np.zeros(200, int), labels, HOW))
    assert checks(only, "error") == {"classes"}
    skewed = audit(Source(smooth(200), (np.arange(200) > 190).astype(int), how=HOW))
    assert checks(skewed) == {"balance"}


def test_noise_and_constants():
    noise = RNG.uniform(size=(200, 3, 16, 16)).astype(np.float32)
    assert checks(audit(Source(noise, how=HOW)), "error") == {"random"}
    flat = smooth(200)
    flat[5] = 0.5
    assert checks(audit(Source(flat, how=HOW)), "warning") == {"constant"}


def test_roughness_of_noise_is_one_and_of_a_ramp_is_small():
    assert roughness(RNG.normal(size=(200, 200))) == pytest.approx(1, abs=0.05)
    # A ramp of n steps of 1: mean square step 1, variance (n^2 - 1) / 12.
    assert roughness(np.arange(50.0)) == pytest.approx(1 / (2 * (50**2 - 1) / 12))
    assert np.isnan(roughness(np.ones(20)))


@pytest.mark.parametrize(
    "wrong",
    [lambda x: x * 255, lambda x: (x - 0.5) / 0.25, lambda x: x / 255],
    ids=["raw", "mean/std", "twice"],
)
def test_values_that_the_preprocessing_cannot_give(wrong):
    assert checks(audit(Source(wrong(smooth(200)).astype(np.float32), how=HOW)), "error") == {"preprocessing"}


def test_raw_pixels_without_a_preprocessing():
    raw = np.rint(smooth(200) * 255).astype(np.float32)
    assert checks(audit(Source(raw)), "warning") == {"preprocessing"}


def test_nan_is_a_finding_not_a_crash():
    bad = smooth(200)
    bad[3, 0, 0, 0] = np.nan
    report = audit(Source(bad, how=HOW))
    assert checks(report, "error") == {"readable"} and not report["fit"]


def test_against_the_evaluation_data():
    evaluation = Source(smooth(200, seed=1))
    assert audit(Source(smooth(200)), evaluation)["findings"] == []
    assert checks(audit(Source(smooth(200) * 0.3), evaluation)) >= {"range", "shift"}
    assert checks(audit(Source(smooth(200)[:, :2]), evaluation)) == {"shape"}
    assert checks(audit(Source(smooth(200, seed=1)), evaluation)) == {"leak"}


def test_limit_reads_no_more_than_needed():
    report = audit(Source(smooth(300), how=HOW), limit=100)
    assert report["samples"] == 300 and 100 <= report["samples_read"] < 140


def test_command(tmp_path):
    np.save(tmp_path / "good.npy", smooth(200))
    np.save(tmp_path / "noise.npy", RNG.normal(size=(200, 3, 16, 16)).astype(np.float32))
    good = CliRunner().invoke(main, ["audit", str(tmp_path / "good.npy")])
    assert good.exit_code == 0 and "fit for calibration" in good.stdout
    bad = CliRunner().invoke(main, ["audit", str(tmp_path / "noise.npy"), "--json", "-"])
    assert bad.exit_code == 1 and '"check": "random"' in bad.stdout
    assert "not fit for calibration" in bad.stderr
    assert CliRunner().invoke(main, ["audit", str(tmp_path / "none.npy")]).exit_code == 2
