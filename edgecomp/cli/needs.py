"""What is installed, read from package metadata: nothing heavy is imported to answer."""

from __future__ import annotations

import re
from importlib import metadata

# The first of a row that is there serves; `edgecomp.runtimes.litert` tries them in this order.
_INSTEAD_OF = {"ai-edge-litert": ("tflite-runtime", "tensorflow")}


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def extras() -> list[str]:
    """The extras of edgecomp that users install (`dev` and `all` are left out)."""
    found = metadata.metadata("edgecomp").get_all("Provides-Extra") or []
    return [name for name in found if name not in ("dev", "all")]


def required_by(distribution: str, extra: str | None = None) -> list[str]:
    """Names of the distributions that `distribution`, or one extra of it, asks for."""
    rows = metadata.requires(distribution) or []
    if extra:
        chosen = [row for row in rows if re.search(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]", row)]
    else:
        chosen = [row for row in rows if "extra" not in row.partition(";")[2]]
    return [re.split(r"[\s\[<>=!~;(@]", row, maxsplit=1)[0] for row in chosen]


def missing_from(names: list[str]) -> list[str]:
    """Those of `names` that are not installed, and that no alternative stands in for."""
    return [n for n in names if not any(version_of(m) for m in (n, *_INSTEAD_OF.get(n, ())))]
