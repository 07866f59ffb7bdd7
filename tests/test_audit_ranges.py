"""Stability of activation ranges over draws of calibration samples."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edgecomp.audit_ranges import extremes, stability
from edgecomp.cli import main
from edgecomp.errors import DataError
from edgecomp.spec import Batch, TensorSpec

SPECS = (TensorSpec("x", (1, 4)),)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.twice = torch.nn.Linear(4, 4, bias=False)
        torch.nn.init.eye_(self.twice.weight)
        self.twice.weight.data *= 2

    def forward(self, x):
        return self.twice(x).relu()


class Source:
    labels, preprocessing = (), None

    def __init__(self, inputs):
        self.inputs = inputs.astype(np.float32)

    def __len__(self):
        return len(self.inputs)

    def batches(self, size, *, shuffle_seed=None):
        for start in range(0, len(self), size):
            yield Batch((self.inputs[start : start + size],))


def test_extremes_by_hand():
    inputs = np.array([[1.0, -2, 3, 0], [0.5, 0, 0, -4]])
    names, modules, lows, highs = extremes(Net().eval(), SPECS, Source(inputs), 2)
    at = modules.index("twice")
    np.testing.assert_array_equal(lows[:, at], [-4, -8])
    np.testing.assert_array_equal(highs[:, at], [6, 1])
    assert len(names) == 2


def test_equal_samples_are_enough_at_once():
    report = stability(Net().eval(), SPECS, Source(np.tile([[1.0, -1, 2, 0]], (64, 1))))
    assert report["enough"] == 8
    assert [d["samples"] for d in report["draws"]] == [8, 16, 32]
    assert all(d["deviation"] == 0 for d in report["draws"])


def test_one_rare_outlier_means_that_few_samples_are_not_enough():
    inputs = np.random.default_rng(0).uniform(-1, 1, (128, 4))
    inputs[5] = 100
    report = stability(Net().eval(), SPECS, Source(inputs))
    assert report["enough"] is None
    assert report["draws"][0]["worst_deviation"] > 0.9


def test_deviation_falls_with_the_number_of_samples():
    inputs = np.random.default_rng(0).normal(size=(256, 4))
    deviations = [d["deviation"] for d in stability(Net().eval(), SPECS, Source(inputs))["draws"]]
    assert deviations[0] > deviations[-1] > 0


def test_too_few():
    with pytest.raises(DataError, match="at least 16"):
        stability(Net().eval(), SPECS, Source(np.ones((15, 4))))


def test_command(tmp_path):
    words = ["audit", "edgecomp.calibration_data.sample:fashion_calibration", "--json", "-"]
    words += ["--model", "edgecomp.demo.model:build", "--limit", "64"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.stderr
    ranges = json.loads(result.stdout)["ranges"]
    assert ranges["samples"] == 64 and ranges["layers"] > 20
