"""Writes `report.html` (one file, no network, no script) and `report.md` from a ledger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from edgecomp import files
from edgecomp.report import templates
from edgecomp.report.view import view


def write(ledger: Mapping[str, Any], folder: Path) -> Path:
    """Write both files into `folder`, atomically; returns the path of `report.html`.

    `ledger`: keys as docs/contract.md lists them; what is missing is shown as "not measured".
    Raises OutputError when the folder cannot be written.
    """
    final = Path(folder) / "report.html"
    for path, text in ((final, html(ledger)), (final.with_suffix(".md"), markdown(ledger))):
        with files.atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return final


def html(ledger: Mapping[str, Any]) -> str:
    """The page as text; everything that comes from the ledger is escaped."""
    css = Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8"))
    return templates.environment().get_template("report.html.j2").render(view=view(ledger), css=css)


def markdown(ledger: Mapping[str, Any]) -> str:
    """The same facts as GitHub's Markdown, without the pictures."""
    environment = templates.environment(escaped=False)
    environment.filters["inline"] = inline
    return environment.get_template("report.md.j2").render(view=view(ledger))


def inline(text: object) -> str:
    """Text that breaks neither a table nor a line of Markdown."""
    escaped = str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return " ".join(escaped.split())
