"""How templates of the report are read: strict about names, without the white space of their own commands."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment(*, escaped: bool = True) -> Environment:
    """`escaped`: for HTML; Markdown is not, and keeps its last line break."""
    return Environment(
        loader=PackageLoader("edgecomp.report", ""),
        autoescape=escaped,
        keep_trailing_newline=not escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
