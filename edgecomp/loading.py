"""Data by its spec: a folder, an `.npz`, `.npy` or CSV file, or a Python callable."""

from __future__ import annotations

from pathlib import Path

from edgecomp import registry
from edgecomp.errors import DataError
from edgecomp.spec import DataSource, Preprocessing

# The most precise claim first; third-party sources come before all of them.
_BUILT_IN = ("arrays", "csv", "callable", "audio", "images")


def open_data(
    spec: str, preprocessing: Preprocessing | None = None, labels: tuple[str, ...] | None = None
) -> DataSource:
    """The data source that a SRC argument names.

    `labels`: class names in the model's order; a folder or file whose labels are others is refused.
    Raises DataError when nothing is there, when no source accepts it, or when its contents are unfit.
    """
    for name in _order():
        source = registry.load("data", name)
        if source.accepts(spec):
            return source(spec, preprocessing, labels)
    path = Path(spec)
    what = "is not data that edgecomp can read" if path.exists() else "does not exist"
    raise DataError(
        f"data {spec!r} {what}; expected a folder of images or WAV files, an .npz, .npy or CSV file, "
        "or path/to/file.py:callable"
    )


def _order() -> list[str]:
    known = registry.names("data")
    return [n for n in known if n not in _BUILT_IN] + [n for n in _BUILT_IN if n in known]
