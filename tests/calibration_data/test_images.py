"""Folders of pictures: labels, order, preprocessing against torch, bad files."""

import numpy as np
import pytest
import torch
from PIL import Image

from edgecomp.calibration_data import picture
from edgecomp.calibration_data.images import ImageFolder
from edgecomp.errors import DataError
from edgecomp.loading import open_data
from edgecomp.spec import Preprocessing

RNG = np.random.default_rng(5)


def save(path, height=12, width=16, channels=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)
    Image.fromarray(pixels if channels == 3 else pixels[:, :, 0]).save(path)
    return pixels


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "ant", "bee"):
        for i in range(2):
            save(tmp_path / name / f"{i}.png")
    (tmp_path / "cat" / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_sub_folders_are_labels_in_alphabetical_order(folder):
    source = open_data(str(folder))
    assert isinstance(source, ImageFolder)
    assert source.labels == ("ant", "bee", "cat")
    batches = list(source.batches(4))
    assert [len(b) for b in batches] == [4, 2] and len(source) == 6
    np.testing.assert_array_equal(np.concatenate([b.targets for b in batches]), [0, 0, 1, 1, 2, 2])
    assert batches[0].inputs[0].shape == (4, 3, 12, 16)
    assert batches[0].inputs[0].dtype == np.float32
    assert batches[0].rows[2]["path"].endswith("bee/0.png")


def test_labels_may_be_given_in_the_models_order(folder):
    source = ImageFolder(str(folder), labels=("dog", "cat", "bee", "ant"))
    np.testing.assert_array_equal(next(source.batches(6)).targets, [1, 1, 2, 2, 3, 3])
    with pytest.raises(DataError, match="not labels of the model: bee"):
        ImageFolder(str(folder), labels=("ant", "cat"))


def test_shuffling_is_a_permutation_fixed_by_the_seed(folder):
    source = ImageFolder(str(folder))
    plain = [r["path"] for b in source.batches(4) for r in b.rows]
    shuffled = [r["path"] for b in source.batches(4, shuffle_seed=1) for r in b.rows]
    assert shuffled == [r["path"] for b in source.batches(3, shuffle_seed=1) for r in b.rows]
    assert shuffled != plain and sorted(shuffled) == sorted(plain)


def test_a_flat_folder_has_no_targets(tmp_path):
    save(tmp_path / "b.png")
    save(tmp_path / "a.png")
    batch = next(ImageFolder(str(tmp_path)).batches(8))
    assert batch.targets is None
    assert [r["path"].rsplit("/")[-1] for r in batch.rows] == ["a.png", "b.png"]


def test_metadata_joins_by_file_name(folder):
    (folder / "metadata.csv").write_text("file,light\nant/1.png,dark\n")
    rows = next(ImageFolder(str(folder)).batches(6)).rows
    assert rows[1]["light"] == "dark" and "light" not in rows[0]
    (folder / "metadata.csv").write_text("name,light\nant/1.png,dark\n")
    with pytest.raises(DataError, match="must be called 'file'"):
        ImageFolder(str(folder))


@pytest.mark.parametrize("layout, order", [("NCHW", "RGB"), ("NHWC", "BGR")])
def test_values_by_hand(tmp_path, layout, order):
    pixels = save(tmp_path / "a.png").astype(np.float64)
    how = Preprocessing(layout=layout, colour_order=order, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    expected = pixels[:, :, ::-1] if order == "BGR" else pixels
    expected = (expected / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    if layout == "NCHW":
        expected = expected.transpose(2, 0, 1)
    found = next(ImageFolder(str(tmp_path), how).batches(1)).inputs[0][0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_grey_and_eight_bits(tmp_path):
    pixels = save(tmp_path / "a.png", channels=1)
    how = Preprocessing(colour_order="L", rescale=1.0, dtype="uint8")
    found = next(ImageFolder(str(tmp_path), how).batches(1)).inputs[0]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0, 0], pixels[:, :, 0])


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(7, 9), (30, 50)])
def test_bilinear_resize_is_torchs(antialias, size):
    """Within one 8-bit level: Pillow rounds to whole pixels, torch does not."""
    pixels = RNG.integers(0, 256, (24, 31, 3), dtype=np.uint8)
    how = Preprocessing(size=size, crop="none", antialias=antialias, rescale=1.0)
    found = picture.prepare(Image.fromarray(pixels), how)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(tensor, size=size, mode="bilinear", antialias=antialias)
    assert np.abs(found - expected[0].numpy()).max() <= 1.01


def test_resize_shorter_side_then_centre_crop():
    pixels = RNG.integers(0, 256, (40, 80, 3), dtype=np.uint8)
    how = Preprocessing(size=(16, 16), resize=20, rescale=1.0)
    small = np.asarray(Image.fromarray(pixels).resize((40, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(
        picture.prepare(Image.fromarray(pixels), how), small[2:18, 12:28].transpose(2, 0, 1)
    )


def test_without_resize_the_picture_covers_the_crop():
    pixels = RNG.integers(0, 256, (40, 80, 3), dtype=np.uint8)
    how = Preprocessing(size=(20, 10), rescale=1.0)
    small = np.asarray(Image.fromarray(pixels).resize((40, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(
        picture.prepare(Image.fromarray(pixels), how), small[:, 15:25].transpose(2, 0, 1)
    )


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(RNG.integers(0, 256, (6, 10, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    assert next(ImageFolder(str(tmp_path)).batches(1)).inputs[0].shape == (1, 3, 10, 6)


@pytest.mark.parametrize(
    "how, message",
    [
        (Preprocessing(size=(64, 64), resize=32), "smaller than the crop"),
        (Preprocessing(mean=(0.1, 0.2)), "mean has 2 values for 3 channels"),
        (Preprocessing(size=(5, 5), kernel="lanczos", antialias=False), "lanczos"),
    ],
)
def test_preprocessing_that_cannot_be_applied(tmp_path, how, message):
    save(tmp_path / "a.png")
    with pytest.raises(DataError, match=message):
        list(ImageFolder(str(tmp_path), how).batches(1))


def test_missing_empty_and_mixed_folders(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        ImageFolder(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="holds no pictures"):
        open_data(str(tmp_path))
    save(tmp_path / "a.png")
    save(tmp_path / "cat" / "b.png")
    with pytest.raises(DataError, match="beside sub-folders"):
        ImageFolder(str(tmp_path))


def test_a_file_that_is_no_picture_is_named_at_once(folder):
    (folder / "bee" / "fake.jpg").write_text("hello")
    with pytest.raises(DataError, match=r"bee/fake\.jpg"):
        ImageFolder(str(folder))


def test_a_truncated_picture_is_named_when_it_is_read(tmp_path):
    save(tmp_path / "a.png", 64, 64)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.png does not decode"):
        list(ImageFolder(str(tmp_path)).batches(1))


def test_pictures_of_different_size_need_a_size(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", 20, 20)
    with pytest.raises(DataError, match="give a preprocessing with a size"):
        list(ImageFolder(str(tmp_path)).batches(2))
