"""Make calibration_data/samples/fashion-*: a class-balanced part of Fashion-MNIST that ships with edgecomp.

Takes the original files from the Debian package `dataset-fashion-mnist` (MIT licence), which is
downloaded with `apt-get download` and unpacked without being installed. The first images of each class
are kept, in the data set's own order, interleaved by class. Same package, same bytes.

    python scripts/make_fashion_sample.py [--out calibration_data/samples] [--package FILE.deb]
"""

from __future__ import annotations

import argparse
import gzip
import io
import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

PER_CLASS = {"train": 580, "test": 200}
PREFIX = {"train": "train", "test": "t10k"}
CLASSES = 10
LIMIT_BYTES = 3_000_000
# Found by trial on these images; xz beats the deflate of .npz and of PNG by 14 and 5 percent.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]


def unpack(package: Path | None, folder: Path) -> Path:
    if package is None:
        subprocess.run(["apt-get", "download", "dataset-fashion-mnist"], cwd=folder, check=True)
        package = next(folder.glob("dataset-fashion-mnist_*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "root")], check=True)
    return folder / "root/usr/share"


def idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes: two zero bytes, type 8, number of dimensions, sizes, data."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def balanced(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Indices of the first `per_class` samples of each class, one of each class in turn."""
    return np.stack([np.flatnonzero(labels == c)[:per_class] for c in range(CLASSES)], axis=1).ravel()


def write(path: Path, array: np.ndarray) -> int:
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array))
    path.write_bytes(lzma.compress(stream.getvalue(), format=lzma.FORMAT_XZ, filters=FILTERS))
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).resolve().parents[1] / "calibration_data/samples"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--package", type=Path, help="a .deb that was downloaded before")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        share = unpack(arguments.package, Path(folder))
        total = 0
        for split, per_class in PER_CLASS.items():
            source = share / "datasets/fashion-mnist"
            labels = idx(source / f"{PREFIX[split]}-labels-idx1-ubyte.gz")
            images = idx(source / f"{PREFIX[split]}-images-idx3-ubyte.gz")
            chosen = balanced(labels, per_class)
            total += write(arguments.out / f"fashion-{split}-images.npy.xz", images[chosen])
            total += write(arguments.out / f"fashion-{split}-labels.npy.xz", labels[chosen])
        notice = (share / "doc/dataset-fashion-mnist/copyright").read_text()
    (arguments.out / "fashion-LICENSE.txt").write_text(notice)
    total += len(notice.encode())
    if total > LIMIT_BYTES:
        raise SystemExit(f"{total} bytes; at most {LIMIT_BYTES} may ship: lower PER_CLASS")
    print(f"{total} bytes in {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
