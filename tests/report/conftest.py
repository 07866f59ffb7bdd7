"""The ledger of `ledgers.py`, fresh for each test."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def ledger() -> dict[str, Any]:
    found = importlib.util.spec_from_file_location("report_ledgers", Path(__file__).parent / "ledgers.py")
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    full: dict[str, Any] = module.full()
    return full
