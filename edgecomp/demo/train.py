"""Train the demo's float model on the whole Fashion-MNIST training set and write `fashion.pt`.

The data is Debian's package `dataset-fashion-mnist` (MIT licence): `apt-get install dataset-fashion-mnist`.
Only the 60,000 training pictures are used; the 10,000 test pictures, from which the shipped sample's test
part is drawn, are read once at the end to print the accuracy.

    python -m edgecomp.demo.train [--data FOLDER] [--epochs N]
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch

from edgecomp import files
from edgecomp.calibration_data.sample import PREPROCESSING
from edgecomp.compress.train import Finetune
from edgecomp.demo.model import WEIGHTS, build
from edgecomp.spec import Batch, Candidate, Data, Preprocessing, TensorSpec


class IdxPictures:
    """Half of Fashion-MNIST: `inputs` [N, 1, 28, 28] float32 normalized as the sample, `targets` int64."""

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = PREPROCESSING

    def __init__(self, folder: Path, part: str) -> None:
        pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
        self.pixels = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28)
        self.targets = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        order = np.arange(len(self))
        if shuffle_seed is not None:
            np.random.default_rng(shuffle_seed).shuffle(order)
        for start in range(0, len(self), size):
            rows = order[start : start + size]
            mean, std = PREPROCESSING.mean[0], PREPROCESSING.std[0]
            pictures = (self.pixels[rows].astype(np.float32) * PREPROCESSING.rescale - mean) / std
            yield Batch((pictures.astype(np.float32),), self.targets[rows])


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("/usr/share/datasets/fashion-mnist"))
@click.option("--epochs", default=14, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=WEIGHTS)
def main(data: Path, epochs: int, out: Path) -> None:
    """Train, print the accuracy on the 10,000 test pictures, write the weights as float16."""
    torch.manual_seed(0)
    candidate = Candidate(build(trained=False), (TensorSpec("x", (1, 1, 28, 28), layout="NCHW"),))
    train = Finetune(
        epochs=epochs, batch_size=128, learning_rate=4e-3, weight_decay=0.05, label_smoothing=0.05,
        validation=0.05, flip=True, shift=2,
    )  # fmt: skip
    model = train(candidate, Data(train=IdxPictures(data, "train"))).module
    with files.atomic(out) as temporary:
        torch.save({name: value.half() for name, value in model.state_dict().items()}, temporary)
    right = 0
    with torch.inference_mode():
        for batch in IdxPictures(data, "t10k").batches(500):
            right += int((model(torch.from_numpy(batch.inputs[0])).argmax(1).numpy() == batch.targets).sum())
    click.echo(f"accuracy on the 10,000 test pictures: {right / 10_000:.4f}")


if __name__ == "__main__":
    main()
