"""A folder of WAV files; sub-folders are labels."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

from edgecomp.calibration_data.base import IndexedSource, labelled_files, stack
from edgecomp.calibration_data.images import read_metadata
from edgecomp.errors import DataError
from edgecomp.spec import Batch, Preprocessing

SUFFIXES = frozenset((".wav",))


class WavFolder(IndexedSource):
    """PCM WAV files (8, 16, 24, 32 bits), all of one sample rate and length, decoded batch by batch.

    A sample is float32 in [-1, 1), `(x - mean) / std` of it: [channels, time] with layout NCW (default),
    [time, channels] with NWC, [time] (channels averaged) with NC. `preprocessing.sample_rate`, where it is
    set, must be the files' own: nothing is resampled.
    Raises DataError for a folder that is missing or empty, files that do not decode, another rate.
    """

    def __init__(
        self, spec: str, preprocessing: Preprocessing | None = None, labels: tuple[str, ...] | None = None
    ) -> None:
        self.folder = Path(spec)
        self.files, self.classes, self.labels = labelled_files(self.folder, SUFFIXES, "WAV files", labels)
        rates = {p: _header(p) for p in self.files}
        rate = rates[self.files[0]]
        self.preprocessing: Preprocessing = preprocessing or Preprocessing(
            layout="NCW", rescale=1.0, sample_rate=rate
        )
        if self.preprocessing.layout not in ("NCW", "NWC", "NC"):
            raise DataError(
                f"layout is {self.preprocessing.layout!r}; for WAV files expected NCW, NWC or NC (mono)"
            )
        expected = self.preprocessing.sample_rate or rate
        for path, found in rates.items():
            if found != expected:
                raise DataError(
                    f"{path} has a sample rate of {found} Hz; expected {expected} Hz: resample the file, or "
                    "correct sample_rate in the preprocessing"
                )
        self.metadata = read_metadata(self.folder)

    @classmethod
    def accepts(cls, spec: str) -> bool:
        folder = Path(spec)
        return folder.is_dir() and any(p.suffix.lower() in SUFFIXES for p in folder.rglob("*"))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: np.ndarray) -> Batch:
        paths = [self.files[i] for i in indices]
        samples = [self._sample(p) for p in paths]
        targets = None if self.classes is None else self.classes[indices]
        rows = tuple(
            {"path": str(p), **self.metadata.get(p.relative_to(self.folder).as_posix(), {})} for p in paths
        )
        return Batch((stack(samples, [str(p) for p in paths]),), targets, rows)

    def _sample(self, path: Path) -> np.ndarray:
        how = self.preprocessing
        mean, std = np.asarray(how.mean, np.float32), np.asarray(how.std, np.float32)
        signal = (decode(path) - mean) / std
        if how.layout == "NC":
            signal = signal.mean(axis=1)
        elif how.layout == "NCW":
            signal = signal.T
        return np.ascontiguousarray(signal).astype(how.dtype)


def decode(path: Path) -> np.ndarray:
    """PCM samples as float32 [time, channels] in [-1, 1). Raises DataError that names the file."""
    with _opened(path) as wav:
        width, channels = wav.getsampwidth(), wav.getnchannels()
        raw = wav.readframes(wav.getnframes())
        promised = wav.getnframes() * width * channels
    if len(raw) < promised or not raw:
        raise DataError(
            f"{path} holds {len(raw)} bytes of sound, its header promises {promised}; "
            "the file was cut short or is empty: replace it by a whole one"
        )
    return pcm(raw, width).reshape(-1, channels)


def pcm(raw: bytes, width: int) -> np.ndarray:
    """Little-endian PCM of 1 (unsigned), 2, 3 or 4 bytes a sample -> float32 in [-1, 1), flat."""
    if width == 1:
        return (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    if width == 3:
        parts = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        padded = np.zeros((len(parts), 4), np.uint8)
        padded[:, 1:] = parts
        return (padded.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    integers = np.frombuffer(raw, "<i2" if width == 2 else "<i4")
    return (integers / 2.0 ** (8 * width - 1)).astype(np.float32)


def _opened(path: Path) -> wave.Wave_read:
    try:
        return wave.open(str(path), "rb")
    except (wave.Error, EOFError, OSError) as error:
        raise DataError(
            f"{path} does not decode as PCM WAV ({error or 'file is empty'}); "
            "convert it to 16-bit PCM or remove it"
        ) from error


def _header(path: Path) -> int:
    with _opened(path) as wav:
        return wav.getframerate()
