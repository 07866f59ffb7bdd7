"""The roles of data of a run, opened and looked at before any work."""

from __future__ import annotations

from collections.abc import Iterator

from edgecomp.errors import DataError
from edgecomp.loading import open_data
from edgecomp.recipe import DataEntries, DataEntry
from edgecomp.spec import Batch, Data, DataSource, Preprocessing


class Limited:
    """The first `count` samples of a source, in its own order; shuffled among themselves on request."""

    def __init__(self, source: DataSource, count: int) -> None:
        self._source = source
        self._count = count
        self.labels: tuple[str, ...] = source.labels
        self.preprocessing: Preprocessing | None = source.preprocessing

    def __len__(self) -> int:
        return min(self._count, len(self._source))

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        """As DataSource.batches; shuffling permutes whole batches, so that nothing is held in memory."""
        left = len(self)
        for batch in self._source.batches(size):
            if left <= 0:
                return
            keep = min(left, len(batch))
            targets = None if batch.targets is None else batch.targets[:keep]
            yield Batch(tuple(a[:keep] for a in batch.inputs), targets, batch.rows[:keep])
            left -= keep


def open_roles(entries: DataEntries) -> Data:
    """Open every role and read its first batch. Raises DataError that names the role."""
    evaluation = _open("evaluation", entries.evaluation)
    labels = evaluation.labels if evaluation else ()
    calibration = _open("calibration", entries.calibration, labels)
    return Data(_open("train", entries.train, labels), calibration, evaluation)


def _open(role: str, entry: DataEntry | None, labels: tuple[str, ...] = ()) -> DataSource | None:
    if entry is None:
        return None
    try:
        source = open_data(entry.source, entry.decided(), labels or None)
        if entry.limit is not None:
            source = Limited(source, entry.limit)
        if len(source) == 0 or next(iter(source.batches(1)), None) is None:
            raise DataError(f"{entry.source!r} is empty; expected at least one sample")
    except DataError as error:
        raise DataError(f"data.{role}: {error}") from error
    return source
