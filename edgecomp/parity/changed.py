"""A data source whose batches are changed on their way, for corruptions and adversarial inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from edgecomp.spec import Batch, DataSource, Preprocessing

# (batch, number of its first sample) -> the changed first input, of the same shape.
ChangeBatch = Callable[[Batch, int], np.ndarray]


class ChangedSource:
    """Another source with its first input changed; targets, rows and other inputs stay."""

    def __init__(self, source: DataSource, change: ChangeBatch) -> None:
        self._source, self._change = source, change

    @property
    def labels(self) -> tuple[str, ...]:
        return self._source.labels

    @property
    def preprocessing(self) -> Preprocessing | None:
        return self._source.preprocessing

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        number = 0
        for batch in self._source.batches(size, shuffle_seed=shuffle_seed):
            changed = self._change(batch, number)
            number += len(batch)
            yield replace(batch, inputs=(changed, *batch.inputs[1:]))
