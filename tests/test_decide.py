"""Quantization under a budget: what is tried, what is kept, where it stops, and what it reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from edgecomp import checkpoint, decide_bits
from edgecomp.cli.quantize import command
from edgecomp.compress.ptq import Quantize
from edgecomp.decide import QuantizeToBudget
from edgecomp.decide_judge import Judge, Part
from edgecomp.errors import DataError, ModelError, RecipeError
from edgecomp.pipeline_steps import count
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec


class Net(nn.Module):
    """A layer whose loud channel is clipped after it: 8 bits of its result cost most."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)
        self.stem.weight.data[0] *= 30
        self.body.weight.data[:, 1:] *= 30
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardtanh(self.stem(x), -8, 8)
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


class Samples:
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __init__(self, count: int, seed: int, labelled: bool = False) -> None:
        self.x = np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)
        self.y = Net().eval()(torch.from_numpy(self.x)).argmax(1).numpy() if labelled else None

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for i in range(0, len(self.x), size):
            yield Batch((self.x[i : i + size],), None if self.y is None else self.y[i : i + size])


def candidate() -> Candidate:
    return Candidate(Net().eval(), (TensorSpec("x", (1, 3, 8, 8)),))


DATA = Data(calibration=Samples(24, 0), evaluation=Samples(40, 1))


def test_it_stops_at_the_first_method_that_holds() -> None:
    found = QuantizeToBudget(max_drop=100.0)(candidate(), DATA)
    record = found.history[-1]
    assert [a["method"] for a in record.settings["attempts"]] == ["min-max ranges, nearest rounding"]
    assert record.name == "quantize-to-budget" and "of 100 points holds" in record.notes[0]
    assert "top-1 disagreement on 40 samples (evaluation data)" in record.notes[0]
    assert found.quantization is not None and found.original is not None


def test_a_budget_of_noise_is_judged_by_noise_whatever_the_classes() -> None:
    first = QuantizeToBudget(max_drop=100.0)(candidate(), DATA).history[-1].settings["attempts"][0]
    wanted = first["quality"]["sqnr_db"] + 6
    record = QuantizeToBudget(min_sqnr_db=wanted, train_epochs=0)(candidate(), DATA).history[-1]
    attempts = record.settings["attempts"]
    assert len(attempts) > 1 and attempts[0]["kept"]
    assert attempts[0]["quality"]["sqnr_db"] == pytest.approx(first["quality"]["sqnr_db"])
    assert attempts[0]["quality"]["drop"] == pytest.approx(100 * 10 ** (-first["quality"]["sqnr_db"] / 10))
    kept = [a["quality"]["sqnr_db"] for a in attempts if a["kept"]]
    assert kept == sorted(kept) and kept[-1] >= wanted
    assert record.notes[0].startswith(f"the budget of {wanted:g} dB holds: {kept[-1]:.2f} dB on 40 samples")


def test_what_pays_is_kept_and_the_next_starts_from_it() -> None:
    step = QuantizeToBudget(max_drop=0.0, train_epochs=1, learning_rate=1e-3)
    found = step(candidate(), Data(calibration=Samples(24, 0), evaluation=Samples(300, 1)))
    attempts = found.history[-1].settings["attempts"]
    assert attempts[0]["kept"] and attempts[0]["gain_db"] is None
    best = attempts[0]["quality"]
    for each in attempts[1:]:
        quality = each["quality"]
        better = quality["drop"] < best["drop"] or (
            quality["drop"] == best["drop"] and quality["sqnr_db"] > best["sqnr_db"] + 0.1
        )
        assert each["kept"] == better
        assert each["gain_points"] == pytest.approx(best["drop"] - quality["drop"])
        best = quality if better else best
    again = Judge.prepare(candidate(), Data(evaluation=Samples(300, 1)), 500)[0].quality(found)
    assert again.sqnr_db == pytest.approx(best["sqnr_db"], abs=1e-6)


def test_labels_make_the_drop_one_of_the_metric() -> None:
    data = Data(calibration=Samples(24, 0), evaluation=Samples(40, 1, labelled=True))
    judge, _ = Judge.prepare(candidate(), data, 500)
    made = Quantize(rounding="nearest", weight_bits=4)(candidate(), data)
    quality = judge.quality(made)
    assert judge.unit == "accuracy" and judge.value == 1.0
    assert quality.metric == quality.agreement
    assert quality.drop == pytest.approx(100 * (1 - quality.metric))


def test_without_evaluation_data_a_part_of_calibration_judges() -> None:
    judge, left = Judge.prepare(candidate(), Data(calibration=Samples(24, 0)), 500)
    assert judge.count == 6 and len(left.calibration) == 18
    kept = np.concatenate([b.inputs[0] for b in left.calibration.batches(7)])
    held = np.concatenate([b.inputs[0] for b in judge.source.batches(4)])
    np.testing.assert_array_equal(np.concatenate([kept, held]), Samples(24, 0).x)
    with pytest.raises(DataError, match="only 4 calibration samples"):
        Judge.prepare(candidate(), Data(calibration=Samples(4, 0)), 500)


def test_a_part_holds_each_of_its_samples_once_in_any_order() -> None:
    part = Part(Samples(24, 0), 5, 17)
    shuffled = np.concatenate([b.inputs[0] for b in part.batches(4, shuffle_seed=3)])
    assert len(part) == len(shuffled) == 12
    assert {r.tobytes() for r in shuffled} == {r.tobytes() for r in Samples(24, 0).x[5:17]}


def test_sixteen_bits_go_where_eight_cost_most() -> None:
    made = Quantize(rounding="nearest")(candidate(), DATA)
    found = decide_bits.measured(made, DATA.calibration)
    half = decide_bits.activation_noise(found) / 2
    rules = decide_bits.wider_activations(made, found, half)
    assert list(rules) == ["node:conv2d"] and rules["node:conv2d"].activation_bits == 16
    wide = Quantize(rounding="nearest", rules=rules)(candidate(), DATA)
    judge, _ = Judge.prepare(candidate(), DATA, 500)
    assert judge.quality(wide).sqnr_db > judge.quality(made).sqnr_db + 1


class Regression(nn.Module):
    """Outputs [N, 1]: nothing to classify, so that noise itself is the drop."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.last = Net(), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x))


def test_a_budget_of_noise_is_what_wider_activations_aim_at() -> None:
    given = Candidate(Regression().eval(), (TensorSpec("x", (1, 3, 8, 8)),))
    first = QuantizeToBudget(max_drop=50.0)(given, DATA).history[-1].settings["attempts"][0]
    step = QuantizeToBudget(max_drop=first["quality"]["drop"] / 4, train_epochs=0)
    found = step(given, DATA)
    methods = [a["method"] for a in found.history[-1].settings["attempts"]]
    assert "noise power over output power" in found.history[-1].notes[0]
    assert any("16-bit activations in" in m for m in methods)
    assert " holds: " in found.history[-1].notes[0]
    assert 16 in {q.spec.bits for q in found.quantization.activations.values()}


def test_operations_stay_float_where_that_is_allowed_and_pays() -> None:
    given = Candidate(Regression().eval(), (TensorSpec("x", (1, 3, 8, 8)),))
    found = QuantizeToBudget(max_drop=0.0, train_epochs=0, allow_float=True)(given, DATA)
    tried = [a for a in found.history[-1].settings["attempts"] if "in float" in a["method"]]
    assert tried and all(p.startswith("node:") for p in tried[0]["settings"]["exclude"])
    if tried[0]["kept"]:
        assert found.quantization.float_nodes
        assert any("stays float: excluded by" in n for n in found.history[-1].notes)


def test_an_activation_takes_what_gives_and_what_reads_it_along() -> None:
    made = Quantize(rounding="nearest")(candidate(), DATA)
    found = decide_bits.measured(made, DATA.calibration)
    one = [s for s in found if s.name == "conv2d"]
    assert decide_bits.float_operations(made, one, 0.0) == ("node:conv2d", "node:hardtanh")
    weight = [s for s in found if s.kind == "weight"][:1]
    assert decide_bits.float_operations(made, weight, 0.0) == (f"node:{weight[0].nodes[0]}",)
    assert decide_bits.float_operations(made, found, 1e9) == ()
    left = Quantize(rounding="nearest", exclude=("node:conv2d", "node:hardtanh"))(candidate(), DATA)
    assert set(left.quantization.float_nodes) == {"conv2d", "hardtanh"}


def test_four_bit_weights_fit_a_size() -> None:
    eight = count(Quantize(rounding="nearest")(candidate(), DATA))["size_bytes"]
    found = QuantizeToBudget(max_drop=100.0, size_bytes=eight - 500)(candidate(), DATA)
    assert count(found)["size_bytes"] <= eight - 500
    assert sorted(q.spec.bits for q in found.quantization.weights.values())[:1] == [4]
    with pytest.raises(ModelError, match="with 4 bits everywhere; size_bytes is 100"):
        QuantizeToBudget(max_drop=100.0, size_bytes=100)(candidate(), DATA)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_drop": -1.0}, "max_drop is -1.0"),
        ({"min_sqnr_db": -3.0}, "min_sqnr_db is -3.0"),
        ({"size_bytes": 0}, "size_bytes is 0"),
        ({"train_epochs": -1}, "0 or more"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizeToBudget(**settings)  # type: ignore[arg-type]


def test_the_command_prints_attempts_and_sensitivities(tmp_path: Path) -> None:
    model = tmp_path / "model.py"
    model.write_text(
        "import torch\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),"
        " torch.nn.Linear(144, 3)).eval()\n"
    )
    np.save(tmp_path / "data.npy", Samples(16, 0).x)
    arguments = [f"{model}:make", "--calib", str(tmp_path / "data.npy"), "--max-drop", "50", "--sensitivity"]
    out, report = tmp_path / "q.pt", tmp_path / "q.json"
    done = CliRunner().invoke(command, [*arguments, "--out", str(out), "--json", str(report)])
    assert done.exit_code == 0, done.output
    assert "min-max ranges, nearest rounding" in done.output and "kept" in done.output
    facts = json.loads(report.read_text())
    assert facts["settings"]["attempts"][0]["quality"]["drop"] <= 50
    assert {row["kind"] for row in facts["sensitivity"]} == {"activation", "weight"}
    assert sum(row["share"] for row in facts["sensitivity"]) == pytest.approx(1.0)
    loaded, _ = checkpoint.load(out)
    assert loaded.history[-1].name == "quantize-to-budget"
    refused = CliRunner().invoke(command, [f"{model}:make", "--size-bytes", "9", "--out", str(out)])
    assert refused.exit_code == 2 and "--max-drop" in refused.output
    refused = CliRunner().invoke(command, [f"{model}:make", "--allow-float", "--out", str(out)])
    assert refused.exit_code == 2 and "--max-drop" in refused.output
    both = [*arguments, "--min-sqnr", "20", "--out", str(out)]
    refused = CliRunner().invoke(command, both)
    assert refused.exit_code == 2 and "--min-sqnr" in refused.output
    noisy = [*arguments[:3], "--min-sqnr", "5", "--out", str(tmp_path / "noise.pt")]
    done = CliRunner().invoke(command, noisy)
    assert done.exit_code == 0 and "the budget of 5 dB holds" in done.output
