"""The detective on real pictures and a real TFLite artifact: faults are planted with PIL and NumPy alone."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from edgecomp import manifest
from edgecomp.calibration_data.images import ImageFolder
from edgecomp.cli import main
from edgecomp.compress.ptq import Quantize
from edgecomp.errors import DataError
from edgecomp.exporters.tflite import TFLiteExporter
from edgecomp.parity.diagnose import Case, contract_differences, diagnose
from edgecomp.parity.observe import run
from edgecomp.runtimes.litert import LiteRTRuntime
from edgecomp.spec import Candidate, Data, Preprocessing, TensorSpec

HOW = Preprocessing(size=(32, 32), resize=36, mean=(0.48, 0.45, 0.4), std=(0.23, 0.22, 0.25))
COUNT = 24


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 12, 3, 2, 1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(12, 24, 3, 2, 1),
            torch.nn.ReLU(),
        )
        self.head = torch.nn.Linear(24 * 8 * 8, 7)

    def forward(self, x):
        return (self.head(self.features(x).flatten(1)) * 4).softmax(1)


MODEL_FILE = """
import sys
sys.path.insert(0, {folder!r})
from test_diagnose import Net

def net():
    return Net()
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Crops of photographs, of different sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    photographs = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        with Image.open(photographs / ("astronaut.png", "coffee.png", "chelsea.png")[i % 3]) as image:
            w, h = rng.integers(60, 180, 2)
            x, y = rng.integers(0, image.width - w), rng.integers(0, image.height - h)
            image.convert("RGB").crop((x, y, x + w, y + h)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def artifact(pictures, tmp_path_factory):
    source = ImageFolder(str(pictures), HOW)
    candidate = Candidate(Net().eval(), (TensorSpec("x", (1, 3, 32, 32), layout="NCHW"),))
    data = Data(calibration=source)
    out = tmp_path_factory.mktemp("out") / "net.tflite"
    made = TFLiteExporter("tflite-int8").export(Quantize()(candidate, data), data, out)
    manifest.write(made)
    return out


@pytest.fixture(scope="module")
def case(pictures, artifact):
    session = LiteRTRuntime().open(artifact)
    inputs = next(ImageFolder(str(pictures), HOW).batches(COUNT)).inputs

    def model(arrays):
        return run(session, arrays)

    def make(observed, **changes):
        expected = tuple(model(inputs))
        facts = {
            "model": model,
            "inputs": inputs,
            "expected": expected,
            "observed": (observed if observed is not None else expected[0],),
            "how": HOW,
            "prepare": lambda how: ImageFolder(str(pictures), how),
            "specs": session.inputs,
            "exact": True,
        }
        return Case(**{**facts, **changes})

    return make


def app(pictures, kernel=Image.Resampling.BILINEAR, side=36, bgr=False, stretch=False, nearest_grid=False):
    """An app's own preparation up to 8-bit pixels [N, 32, 32, 3]."""
    done = []
    for path in sorted(pictures.iterdir()):
        image = Image.open(path).convert("RGB")
        if stretch:
            image = image.resize((32, 32), kernel)
        else:
            w, h = image.size
            size = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
            if nearest_grid:
                tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float()
                tensor = torch.nn.functional.interpolate(tensor, size=size[::-1], mode="bilinear")
                image = Image.fromarray(tensor[0].permute(1, 2, 0).round().byte().numpy())
            else:
                image = image.resize(size, kernel)
            left, top = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
            image = image.crop((left, top, left + 32, top + 32))
        pixels = np.asarray(image)
        done.append(pixels[:, :, ::-1] if bgr else pixels)
    return np.stack(done).astype(np.float32)


def normal(pixels):
    return (pixels / 255 - np.float32(HOW.mean)) / np.float32(HOW.std)


def first(array):
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2), np.float32)


FAULTS = {
    "BGR": lambda p: first(normal(app(p, bgr=True))),
    "scale 255": lambda p: first((app(p) - np.float32(HOW.mean)) / np.float32(HOW.std)),
    "raw pixels": lambda p: first(app(p)),
    "no mean and std": lambda p: first(app(p) / 255),
    "-1 to 1": lambda p: first(app(p) / 127.5 - 1),
    "NHWC read as NCHW": lambda p: normal(app(p)).reshape(COUNT, 3, 32, 32).astype(np.float32),
    "resize kernel nearest": lambda p: first(normal(app(p, kernel=Image.Resampling.NEAREST))),
    "resize kernel bicubic": lambda p: first(normal(app(p, kernel=Image.Resampling.BICUBIC))),
    "antialias": lambda p: first(normal(app(p, nearest_grid=True))),
    "crop": lambda p: first(normal(app(p, stretch=True))),
    "crop fraction": lambda p: first(normal(app(p, side=32))),
    "normalized twice": lambda p: first((normal(app(p)) - np.float32(HOW.mean)) / np.float32(HOW.std)),
    "turned 90": lambda p: first(normal(np.rot90(app(p), 1, (1, 2)))),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_of_the_input_is_named(case, pictures, name):
    right = case(None)
    report = diagnose(case(right.model((FAULTS[name](pictures),))[0]))
    assert not report["agree"]
    assert report["cause"] == name, report["causes"][:3]
    assert name in report["verdict"]


def rounded_softmax(o):
    e = np.exp(o)
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize(
    "name, change",
    [
        ("double softmax", rounded_softmax),
        ("label offset +1", lambda o: np.concatenate([o[:, -1:], o[:, :-1]], 1)),
        ("output scale and zero point", lambda o: (o * 256 - 128) / 256),
    ],
)
def test_a_planted_fault_of_the_output_is_named(case, name, change):
    assert diagnose(case(change(case(None).expected[0])))["cause"] == name


def test_quantization_left_out_at_the_door_is_named(case):
    right = case(None)
    spec = right.specs[0]
    q = np.clip(np.rint(right.inputs[0] / spec.scale), -128, 127)  # no zero point
    seen = right.model((((q - spec.zero_point) * spec.scale).astype(np.float32),))[0]
    assert diagnose(case(seen))["cause"] == "input zero point left out"


def test_two_faults_at_once_are_named_together(case, pictures):
    right = case(None)
    seen = right.model((first(app(pictures, bgr=True) / 255),))[0]
    report = diagnose(case(seen))
    assert set(report["cause"].split(" + ")) == {"BGR", "no mean and std"}


def test_swapped_inputs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 4)).astype(np.float32)

    def model(arrays):
        return [arrays[0] * 2 + arrays[1] ** 2]

    report = diagnose(Case(model, (a, b), tuple(model((a, b))), tuple(model((b, a)))))
    assert report["cause"] == "swapped inputs (1, 0)"


def test_right_outputs_need_no_cause(case):
    report = diagnose(case(None))
    assert report["agree"] and report["cause"] is None and report["causes"] == []


def test_noise_is_blamed_on_nothing(case):
    noise = np.random.default_rng(0).dirichlet(np.ones(7), COUNT).astype(np.float32)
    report = diagnose(case(noise))
    assert report["cause"] is None and "none of the usual causes" in report["verdict"]


def test_outputs_of_another_shape_are_refused(case):
    with pytest.raises(DataError, match="same samples"):
        diagnose(case(np.zeros((COUNT, 3), np.float32)))


def test_contract_differences():
    other = Preprocessing(size=(32, 32), resize=36, mean=(0.5,), std=(0.5,))
    assert [d.split(":")[0] for d in contract_differences(HOW, other)] == ["mean", "std"]
    assert contract_differences(None, other) == []


def test_command_with_observed_outputs(case, pictures, artifact, tmp_path):
    right = case(None)
    np.savez(tmp_path / "seen.npz", outputs=right.model((FAULTS["BGR"](pictures),))[0])
    (tmp_path / "model.py").write_text(MODEL_FILE.format(folder=str(Path(__file__).parent)))
    base = ["diagnose", f"{tmp_path}/model.py:net", str(artifact), "--data", str(pictures), "--json", "-"]
    result = CliRunner().invoke(main, [*base, "--observed", str(tmp_path / "seen.npz"), "--samples", "24"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["cause"] == "BGR"


def test_command_with_a_preprocessing_that_is_not_the_artifacts(pictures, artifact, tmp_path):
    """The artifact was made with HOW; the float model was trained on pixels from -1 to 1."""
    facts = {**HOW.to_json(), "mean": [0.5], "std": [0.5]}
    (tmp_path / "right.json").write_text(json.dumps(facts))
    (tmp_path / "model.py").write_text(MODEL_FILE.format(folder=str(Path(__file__).parent)))
    base = ["diagnose", f"{tmp_path}/model.py:net", str(artifact), "--data", str(pictures)]
    result = CliRunner().invoke(main, [*base, "--preprocessing", str(tmp_path / "right.json")])
    assert result.exit_code == 0, result.stderr
    assert "preprocessing differs: mean" in result.stdout


def test_observed_outputs_that_cannot_be_read(pictures, artifact, tmp_path):
    (tmp_path / "seen.npz").write_text("garbage")
    (tmp_path / "model.py").write_text(MODEL_FILE.format(folder=str(Path(__file__).parent)))
    base = ["diagnose", f"{tmp_path}/model.py:net", str(artifact), "--data", str(pictures)]
    result = CliRunner().invoke(main, [*base, "--observed", str(tmp_path / "seen.npz")])
    assert result.exit_code == 2 and "cannot be read" in result.stderr
