"""Arrays, CSV, WAV folders, callables and the shipped sample."""

import tracemalloc
import wave

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecomp import registry
from edgecomp.calibration_data import audio, npy, sample
from edgecomp.calibration_data.arrays import Arrays
from edgecomp.calibration_data.callables import CallableSource
from edgecomp.calibration_data.table import Table
from edgecomp.errors import DataError, UnknownNameError
from edgecomp.loading import open_data
from edgecomp.spec import DataSource, Preprocessing

RNG = np.random.default_rng(3)


def joined(source, size=3, **options):
    return np.concatenate([b.inputs[0] for b in source.batches(size, **options)])


# Arrays


def test_npz_arrays_by_name(tmp_path):
    x, y = RNG.normal(size=(7, 4)).astype(np.float32), np.arange(7) % 2
    np.savez_compressed(tmp_path / "d.npz", x=x, y=y, labels=["no", "yes"], meta_age=np.arange(7) * 10)
    source = open_data(str(tmp_path / "d.npz"))
    assert isinstance(source, DataSource) and source.labels == ("no", "yes") and len(source) == 7
    batch = list(source.batches(4))[1]
    np.testing.assert_array_equal(batch.inputs[0], x[4:])
    np.testing.assert_array_equal(batch.targets, y[4:])
    assert batch.rows[0] == {"age": 40}


def test_npz_of_several_inputs_and_npy(tmp_path):
    a, b = RNG.normal(size=(5, 2)).astype(np.float32), RNG.integers(0, 9, (5, 3))
    np.savez(tmp_path / "d.npz", inputs_0=a, inputs_1=b)
    batch = next(Arrays(str(tmp_path / "d.npz")).batches(5))
    np.testing.assert_array_equal(batch.inputs[0], a)
    np.testing.assert_array_equal(batch.inputs[1], b)
    assert batch.targets is None
    np.save(tmp_path / "d.npy", a)
    np.testing.assert_array_equal(joined(open_data(str(tmp_path / "d.npy"))), a)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_are_read_by_number_when_an_array_is_not_kept(tmp_path, monkeypatch, save):
    monkeypatch.setattr(npy, "KEEP_BYTES", 0)
    x = RNG.normal(size=(50, 3, 4)).astype(np.float32)
    save(tmp_path / "d.npz", inputs=x)
    np.testing.assert_array_equal(joined(Arrays(str(tmp_path / "d.npz"))), x)
    order = np.random.default_rng(9).permutation(50)
    np.testing.assert_array_equal(joined(Arrays(str(tmp_path / "d.npz")), shuffle_seed=9), x[order])


def test_memory_is_bounded_by_the_batch(tmp_path):
    """20 MB on disk, kept limit of 1 MB: the peak stays below 3 MB."""
    np.save(tmp_path / "d.npy", np.zeros((5000, 1000), np.float32))
    limit, npy.KEEP_BYTES = npy.KEEP_BYTES, 1 << 20
    try:
        source = Arrays(str(tmp_path / "d.npy"))
        tracemalloc.start()
        for _ in source.batches(100):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    finally:
        npy.KEEP_BYTES = limit
    assert peak < 3 << 20


def test_fortran_order_is_read_or_refused(tmp_path, monkeypatch):
    x = np.asfortranarray(RNG.normal(size=(6, 4)).astype(np.float32))
    np.save(tmp_path / "d.npy", x)
    np.testing.assert_array_equal(joined(Arrays(str(tmp_path / "d.npy"))), x)
    monkeypatch.setattr(npy, "KEEP_BYTES", 0)
    with pytest.raises(DataError, match="Fortran order"):
        Arrays(str(tmp_path / "d.npy"))


def test_eight_bit_pictures_are_prepared(tmp_path):
    pictures = RNG.integers(0, 256, (3, 5, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=pictures)
    how = Preprocessing(mean=(0.5,), std=(0.25,))
    expected = ((pictures / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(joined(Arrays(str(tmp_path / "d.npz"), how)), expected, atol=1e-5)
    np.testing.assert_array_equal(joined(Arrays(str(tmp_path / "d.npz"))), pictures)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"z": np.zeros((2, 2))}, "one must be called inputs"),
        ({"inputs": np.zeros((0, 2))}, "is empty"),
        ({"inputs": np.zeros((3, 2)), "targets": np.zeros(2)}, "has 2 rows"),
        ({"inputs": np.zeros((3, 2)), "targets": np.array([0, 1, 5]), "labels": ["a", "b"]}, "holds class 5"),
        ({"inputs": np.array([{}, {}], dtype=object)}, "Python objects"),
        ({"inputs": np.zeros((3, 2)), "meta_a": np.zeros(4)}, "meta_a has 4 rows"),
    ],
)
def test_bad_archives(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        Arrays(str(tmp_path / "d.npz"))


def test_damaged_and_missing_arrays(tmp_path):
    with pytest.raises(DataError, match="no file"):
        open_data(str(tmp_path / "d.npz"))
    (tmp_path / "d.npz").write_bytes(b"garbage")
    with pytest.raises(DataError, match="not an .npz archive"):
        Arrays(str(tmp_path / "d.npz"))
    (tmp_path / "d.npy").write_bytes(b"garbage")
    with pytest.raises(DataError, match="not a NumPy array"):
        Arrays(str(tmp_path / "d.npy"))
    np.save(tmp_path / "e.npy", np.zeros((100, 10)))
    (tmp_path / "e.npy").write_bytes((tmp_path / "e.npy").read_bytes()[:500])
    with pytest.raises(DataError, match="cut short"):
        Arrays(str(tmp_path / "e.npy"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_values_name_the_sample(tmp_path, bad):
    x = np.zeros((9, 2), np.float32)
    x[7, 1] = bad
    np.save(tmp_path / "d.npy", x)
    with pytest.raises(DataError, match="sample 7 holds NaN or Inf in its input"):
        joined(Arrays(str(tmp_path / "d.npy")))


def test_labels_that_differ_from_the_models(tmp_path):
    np.savez(tmp_path / "d.npz", inputs=np.zeros((2, 2)), labels=["a", "b"])
    with pytest.raises(DataError, match="in the same order"):
        open_data(str(tmp_path / "d.npz"), labels=("b", "a"))


# CSV


def test_csv_features_targets_and_metadata(tmp_path):
    (tmp_path / "d.csv").write_text("w,species,meta:site,h\n1,wolf,north,2.5\n3,ape,south,4\n")
    source = open_data(f"{tmp_path}/d.csv:species")
    assert isinstance(source, Table) and source.labels == ("ape", "wolf")
    batch = next(source.batches(2))
    np.testing.assert_array_equal(batch.inputs[0], np.array([[1, 2.5], [3, 4]], np.float32))
    np.testing.assert_array_equal(batch.targets, [1, 0])
    assert batch.rows[1] == {"site": "south"}


@pytest.mark.parametrize(
    "text, targets",
    [("a,y\n1,2\n3,0\n", [2, 0]), ("a,Target\n1,0.5\n3,2\n", [0.5, 2]), ("a,b\n1,2\n3,4\n", None)],
)
def test_csv_kinds_of_target(tmp_path, text, targets):
    (tmp_path / "d.csv").write_text(text)
    found = next(Table(str(tmp_path / "d.csv")).batches(2)).targets
    assert (found is None) if targets is None else np.array_equal(found, np.float32(targets))
    assert targets is None or found.dtype == (np.int64 if all(t == int(t) for t in targets) else np.float32)


def test_csv_is_normalized(tmp_path):
    (tmp_path / "d.csv").write_text("a,b\n1,2\n3,4\n")
    source = Table(str(tmp_path / "d.csv"), Preprocessing(mean=(1, 2), std=(2, 4)))
    np.testing.assert_array_equal(joined(source), [[0, 0], [1, 0.5]])
    with pytest.raises(DataError, match="mean has 3"):
        joined(Table(str(tmp_path / "d.csv"), Preprocessing(mean=(1, 2, 3))))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no rows"),
        ("a,b\n", "no rows"),
        ("a,b\n1\n", "row 2 has 1 values"),
        ("a,b\n1,x\n", r"row 2, column 'b' is 'x'"),
        ("y\n1\n", "at least one feature"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        Table(str(tmp_path / "d.csv"))


def test_csv_missing_column_strange_label_and_nan(tmp_path):
    with pytest.raises(DataError, match="no file"):
        open_data(str(tmp_path / "missing.csv"))
    (tmp_path / "d.csv").write_text("a,label\nnan,x\n")
    with pytest.raises(DataError, match="no column 'b'"):
        Table(f"{tmp_path}/d.csv:b")
    with pytest.raises(DataError, match="not labels of the model: x"):
        Table(str(tmp_path / "d.csv"), labels=("y", "z"))
    with pytest.raises(DataError, match="sample 0 holds NaN"):
        joined(Table(str(tmp_path / "d.csv")))


# WAV


def wav(path, integers, rate=8000, width=2, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = np.asarray(integers).astype("<i4").tobytes() if width == 4 else None
    if width == 2:
        raw = np.asarray(integers).astype("<i2").tobytes()
    elif width == 1:
        raw = (np.asarray(integers) + 128).astype("u1").tobytes()
    elif width == 3:
        raw = b"".join(int(i).to_bytes(3, "little", signed=True) for i in np.ravel(integers))
    with wave.open(str(path), "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(raw)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_pcm_widths_by_hand(tmp_path, width):
    full = 2 ** (8 * width - 1)
    wav(tmp_path / "a.wav", [-full, -1, 0, full - 1], width=width)
    expected = np.array([-1, -1 / full, 0, (full - 1) / full], np.float32)
    np.testing.assert_allclose(audio.decode(tmp_path / "a.wav")[:, 0], expected, atol=1e-9)


@pytest.mark.parametrize("layout, shape", [("NCW", (2, 4)), ("NWC", (4, 2)), ("NC", (4,))])
def test_wav_folder_layouts(tmp_path, layout, shape):
    wav(tmp_path / "yes" / "a.wav", np.arange(8) * 1000, channels=2)
    wav(tmp_path / "no" / "b.wav", np.arange(8), channels=2)
    source = open_data(str(tmp_path), Preprocessing(layout=layout))
    assert source.labels == ("no", "yes")
    batch = next(source.batches(2))
    assert batch.inputs[0].shape == (2, *shape)
    frames = (np.arange(8) * 1000 / 2**15).reshape(4, 2)
    expected = {"NCW": frames.T, "NWC": frames, "NC": frames.mean(1)}[layout]
    np.testing.assert_allclose(batch.inputs[0][1], expected, atol=1e-7)


def test_wav_default_preprocessing_and_rate_check(tmp_path):
    wav(tmp_path / "a.wav", np.arange(8))
    source = open_data(str(tmp_path))
    assert source.preprocessing.sample_rate == 8000 and source.preprocessing.layout == "NCW"
    with pytest.raises(DataError, match="8000 Hz; expected 16000 Hz"):
        open_data(str(tmp_path), Preprocessing(layout="NCW", sample_rate=16000))
    with pytest.raises(DataError, match="layout is 'NCHW'"):
        open_data(str(tmp_path), Preprocessing())


def test_bad_wav_files(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF0000")
    with pytest.raises(DataError, match=r"a\.wav does not decode"):
        open_data(str(tmp_path))
    wav(tmp_path / "a.wav", np.arange(1000))
    wav(tmp_path / "b.wav", np.arange(900))
    with pytest.raises(DataError, match="must have one shape"):
        joined(open_data(str(tmp_path)))
    (tmp_path / "b.wav").write_bytes((tmp_path / "b.wav").read_bytes()[:500])
    with pytest.raises(DataError, match="cut short"):
        joined(open_data(str(tmp_path)))


# Callables

CODE = """
import numpy as np
from neighbour import OFFSET

def stream():
    for i in range(10):
        yield np.full((2,), float(i + OFFSET)), i % 3, {"group": "even" if i % 2 == 0 else "odd"}

def pairs():
    return [((np.zeros(2), np.ones((1, 3), int)), None)] * 4

def broken():
    yield np.zeros(2), 0
    raise KeyError("lost")

def early():
    raise RuntimeError("no database")

def ragged():
    yield np.zeros(2), 0
    yield np.zeros(3), 0

def nothing():
    return iter(())

def number():
    return 3

def words():
    yield "text", 1

def single():
    yield np.zeros(2)

CONSTANT = 3
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "neighbour.py").write_text("OFFSET = 1")
    return lambda name: f"{tmp_path}/code.py:{name}"


def test_callable_stream(code):
    source = open_data(code("stream"))
    assert isinstance(source, CallableSource) and isinstance(source, DataSource)
    for _ in range(2):  # it can be passed over again
        batches = list(source.batches(4))
        assert [len(b) for b in batches] == [4, 4, 2]
        assert batches[0].inputs[0].dtype == np.float32
        np.testing.assert_array_equal(batches[2].inputs[0][:, 0], [9, 10])
        np.testing.assert_array_equal(batches[0].targets, [0, 1, 2, 0])
        assert batches[0].rows[1] == {"group": "odd"}
    assert len(source) == 10


def test_callable_shuffles_within_a_window(code, monkeypatch):
    monkeypatch.setattr("edgecomp.calibration_data.callables.SHUFFLE_WINDOW", 4)
    source = open_data(code("stream"))
    first = joined(source, shuffle_seed=2)[:, 0]
    np.testing.assert_array_equal(first, joined(source, shuffle_seed=2)[:, 0])
    assert sorted(first) == list(range(1, 11)) and list(first) != sorted(first)


def test_callable_of_several_inputs_without_target(code):
    batch = next(open_data(code("pairs")).batches(3))
    assert [a.shape for a in batch.inputs] == [(3, 2), (3, 1, 3)] and batch.targets is None


@pytest.mark.parametrize(
    "name, message",
    [
        ("broken", "raised KeyError: 'lost'"),
        ("early", "raised RuntimeError: no database"),
        ("ragged", "must have one shape"),
        ("nothing", "yielded no sample"),
        ("number", "returned int"),
        ("words", "dtype <U4"),
        ("single", r"expected \(inputs, target\)"),
        ("CONSTANT", "expected a callable"),
    ],
)
def test_callables_that_fail(code, name, message):
    with pytest.raises(DataError, match=message):
        joined(open_data(code(name)))


def test_callables_that_are_not_there(code, tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'stream'"):
        open_data(code("streem"))
    with pytest.raises(DataError, match="no file"):
        open_data(f"{tmp_path}/other.py:stream")
    with pytest.raises(DataError, match="no module 'not_there'"):
        open_data("not_there.at_all:stream")
    (tmp_path / "bad.py").write_text("1/0")
    with pytest.raises(DataError, match="ZeroDivisionError"):
        open_data(f"{tmp_path}/bad.py:stream")


# Opening


def test_nothing_there_says_what_is_expected(tmp_path):
    with pytest.raises(DataError, match="does not exist; expected a folder"):
        open_data("no-such-thing")
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(DataError, match="is not data that edgecomp can read"):
        open_data(str(tmp_path / "a.xyz"))


def test_built_in_sources_are_registered():
    assert set(registry.names("data")) >= {"arrays", "audio", "callable", "csv", "images"}


@given(st.text(max_size=20))
def test_any_text_is_opened_or_refused(text):
    try:
        open_data(f"missing-{text}".replace("\0", ""))
    except DataError as error:
        assert len(str(error)) > 20


# The shipped sample


def test_shipped_sample_is_balanced_and_disjoint():
    train, test = sample.fashion_train(), sample.fashion_test()
    assert (len(train), len(test), len(sample.fashion_calibration())) == (5800, 2000, 500)
    for source in (train, test):
        np.testing.assert_array_equal(np.bincount(source.targets), [len(source) // 10] * 10)
        assert source.labels[9] == "Ankle boot"
    seen = {i.tobytes() for i in train.images}
    assert not seen & {i.tobytes() for i in test.images}


def test_shipped_sample_by_spec():
    source = open_data("edgecomp.calibration_data.sample:fashion_test")
    assert source.preprocessing == sample.PREPROCESSING
    batch = next(source.batches(100))
    assert batch.inputs[0].shape == (100, 1, 28, 28) and batch.inputs[0].dtype == np.float32
    low, high = source.preprocessing.exact_range()
    assert batch.inputs[0].min() == pytest.approx(low) and batch.inputs[0].max() == pytest.approx(high)


def test_shipped_sample_stays_small_and_keeps_its_notice():
    from importlib.resources import files

    folder = files("edgecomp.calibration_data") / "samples"
    assert sum(len(f.read_bytes()) for f in folder.iterdir()) <= 3_000_000
    assert "Permission is hereby granted" in (folder / "fashion-LICENSE.txt").read_text()
