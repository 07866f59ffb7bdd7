"""A Python callable that yields samples: `path/to/file.py:callable` or `package.module:callable`.

Called without arguments, once for each pass. It returns either a data source (which is used as it is) or
an iterable of `(inputs, target)`, one sample each, without a batch dimension: `inputs` is an array as the
model takes it, or a tuple of them for a model of several inputs; `target` is a number, an array or None.
A third item, a mapping, is the sample's metadata.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp.calibration_data.base import check_finite, check_size, stack
from edgecomp.errors import DataError, UnknownNameError
from edgecomp.spec import Batch, DataSource, Preprocessing

# Samples held back while a stream without random access is shuffled: memory stays bounded.
SHUFFLE_WINDOW = 1024

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class CallableSource:
    """Samples from user code, a batch at a time. Raises DataError for whatever goes wrong in that code."""

    def __init__(
        self, spec: str, preprocessing: Preprocessing | None = None, labels: tuple[str, ...] | None = None
    ) -> None:
        self.spec = spec
        self._call = load_callable(spec)
        first = self._start()
        self._source = first if isinstance(first, DataSource) else None
        self.labels: tuple[str, ...] = self._labels(labels)
        own = self._source.preprocessing if self._source else None
        self.preprocessing: Preprocessing | None = own or preprocessing
        self._length = len(first) if isinstance(first, Sized) else None

    @classmethod
    def accepts(cls, spec: str) -> bool:
        head, _, name = spec.rpartition(":")
        if head.endswith(".py"):
            return name.isidentifier()
        return bool(_DOTTED.fullmatch(spec)) and not head.endswith((".csv", ".npz", ".npy"))

    def __len__(self) -> int:
        if self._length is None:
            self._length = sum(1 for _ in self._samples())
        return self._length

    @property
    def encode(self) -> Any:
        """The source's own text -> tokens, where it has one; AttributeError where it has not."""
        return self._source.encode  # type: ignore[union-attr]

    def batches(self, size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        """As `DataSource.batches`; a stream is shuffled within a window of SHUFFLE_WINDOW samples."""
        check_size(size)
        if self._source is not None:
            yield from self._source.batches(size, shuffle_seed=shuffle_seed)
            return
        samples: Iterator[Any] = self._samples()
        if shuffle_seed is not None:
            samples = _shuffled(samples, np.random.default_rng(shuffle_seed))
        start = 0
        while chunk := list(islice(samples, size)):
            batch = _batch(chunk, start, self.spec)
            check_finite(batch, range(start, start + len(chunk)))
            yield batch
            start += len(chunk)
        if start == 0:
            raise DataError(f"{self.spec} yielded no sample; expected (inputs, target) for each")

    def _labels(self, given: tuple[str, ...] | None) -> tuple[str, ...]:
        own = self._source.labels if self._source else ()
        if given and own and given != own:
            raise DataError(
                f"{self.spec} has labels {', '.join(own[:5])}..., the model {', '.join(given[:5])}...; "
                "both must be the same, in the same order"
            )
        return own or given or ()

    def _start(self) -> Any:
        try:
            produced = self._call()
        except Exception as error:  # user code may raise anything; the message names it
            raise _broken(self.spec, error) from error
        if not isinstance(produced, DataSource | Iterable):
            raise DataError(
                f"{self.spec} returned {type(produced).__name__}; expected a data source, or an iterable of "
                "(inputs, target)"
            )
        return produced

    def _samples(self) -> Iterator[Any]:
        iterator = iter(self._start())
        while True:
            try:
                sample = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # user code may raise anything; the message names it
                raise _broken(self.spec, error) from error
            yield sample


def load_callable(spec: str) -> Callable[[], Any]:
    """The callable behind `file.py:name` or `package.module:name`. Raises DataError or UnknownNameError."""
    head, _, name = spec.rpartition(":")
    module = _from_file(Path(head), spec) if head.endswith(".py") else _from_package(head, spec)
    found = getattr(module, name, None)
    if found is None:
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UnknownNameError(f"callable in {head}", name, known)
    if not callable(found):
        raise DataError(f"{spec} is {type(found).__name__}; expected a callable without arguments")
    return found


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Imports of what lies in the folder work inside."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _from_package(name: str, spec: str) -> Any:
    try:
        with _importable(Path.cwd()):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise DataError(
            f"data {spec!r}: no module {error.name!r}; give package.module:callable that can be imported, "
            "or path/to/file.py:callable"
        ) from error
    except Exception as error:  # user code may raise anything; the message names it
        raise _broken(spec, error) from error


def _from_file(path: Path, spec: str) -> Any:
    path = path.resolve()
    if not path.is_file():
        raise DataError(f"data {spec!r}: no file at {path}; expected path/to/file.py:callable")
    name = f"edgecomp_data_{zlib.crc32(str(path).encode()):08x}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise DataError(f"data {spec!r}: {path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        with _importable(path.parent):
            module_spec.loader.exec_module(module)
    except Exception as error:  # user code may raise anything; the message names it
        del sys.modules[name]
        raise _broken(spec, error) from error
    return module


def _broken(spec: str, error: Exception) -> DataError:
    return DataError(f"data {spec!r} raised {type(error).__name__}: {error}; correct the callable")


def _shuffled(samples: Iterator[Any], rng: np.random.Generator) -> Iterator[Any]:
    window = list(islice(samples, SHUFFLE_WINDOW))
    for sample in samples:
        at = int(rng.integers(len(window)))
        window[at], sample = sample, window[at]
        yield sample
    rng.shuffle(window)
    yield from window


def _batch(chunk: list[Any], start: int, spec: str) -> Batch:
    names = [f"{spec}, sample {start + i}" for i in range(len(chunk))]
    parts = [_parts(sample, name) for sample, name in zip(chunk, names, strict=True)]
    counts = {len(p[0]) for p in parts}
    if len(counts) > 1:
        raise DataError(f"{names[0]} and later ones have different numbers of inputs: {sorted(counts)}")
    inputs = tuple(stack(column, names) for column in zip(*(p[0] for p in parts), strict=True))
    targets = [p[1] for p in parts]
    if any(t is None for t in targets):
        if not all(t is None for t in targets):
            raise DataError(f"{names[0]} to {names[-1]}: some targets are None; give one for each, or none")
        return Batch(inputs, None, tuple(p[2] for p in parts))
    return Batch(inputs, stack([np.asarray(t) for t in targets], names), tuple(p[2] for p in parts))


def _parts(sample: Any, name: str) -> tuple[tuple[np.ndarray, ...], np.ndarray | None, Mapping[str, Any]]:
    if not isinstance(sample, tuple | list) or len(sample) not in (2, 3):
        raise DataError(
            f"{name} is {type(sample).__name__}; expected (inputs, target) or (inputs, target, metadata)"
        )
    given = sample[0] if isinstance(sample[0], tuple | list) else (sample[0],)
    inputs = tuple(_array(a) for a in given)
    for array in inputs:
        if array.dtype.kind not in "fiub":
            raise DataError(f"{name} has inputs of dtype {array.dtype}; expected arrays of numbers")
    target = None if sample[1] is None else _array(sample[1])
    return inputs, target, dict(sample[2]) if len(sample) == 3 else {}


def _array(value: Any) -> np.ndarray:
    """Array or tensor -> array, float64 -> float32. A torch tensor is detached, without importing torch."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float64 else array
