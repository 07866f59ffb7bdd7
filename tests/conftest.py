"""What every test needs: tables as wide as their contents, wherever the tests run."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _wide_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe has no width; without one, tables are cut at 80 columns and words are broken."""
    monkeypatch.setenv("COLUMNS", "200")
