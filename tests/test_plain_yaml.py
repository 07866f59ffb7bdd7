from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgecomp import plain_yaml


@pytest.mark.parametrize("text", ["2:4", "1:30:00", "190:20:30.15", "-1:2"])
def test_a_pattern_or_a_time_is_text(text: str) -> None:
    assert plain_yaml.load(f"pattern: {text}") == {"pattern": text}


@pytest.mark.parametrize(
    "text", ["0.5", "-3", "+12", "1_000", "0x1F", "0b11", "010", "0", "1.", ".5", "6.0e-3", "-.inf", "1.5e+3"]
)
def test_numbers_are_those_of_pyyaml(text: str) -> None:
    found, expected = plain_yaml.load(text), yaml.safe_load(text)
    assert found == expected and type(found) is type(expected) is not str


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8,
))  # fmt: skip
def test_what_pyyaml_writes_is_read(value: object) -> None:
    assert plain_yaml.load(yaml.safe_dump(value)) == value
