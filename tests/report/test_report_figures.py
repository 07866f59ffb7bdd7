"""Numbers as people read them; expectations written by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecomp.report import figures


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (0.123456, "0.123"),
        (1.5, "1.50"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (-2.5, "\u22122.50"),
        (1e-6, "1.00e\u221206"),
        (math.inf, "\u221e"),
        (math.nan, "not measured"),
        (None, "not measured"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert figures.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (61_234, "61.2 kB"),
        (999_600, "1.00 MB"),
        (5.35e9, "5.35 GB"),
    ],
)
def test_sizes_are_decimal(value: float, text: str) -> None:
    assert figures.size(value) == text


def test_counts_carry_a_letter() -> None:
    assert [figures.count(v) for v in (7, 1500, 12_300_000, None)] == [
        "7",
        "1.50 k",
        "12.3 M",
        "not measured",
    ]


def test_times_change_their_unit() -> None:
    assert figures.seconds(12.34) == "12 s"
    assert figures.seconds(125) == "2 min 5 s"
    assert figures.milliseconds(0.2107) == "0.211 ms"
    assert figures.milliseconds(12_000) == "12.0 s"


def test_shares_are_per_cent_and_their_differences_points() -> None:
    assert figures.metric("accuracy", 0.9018) == "90.18 %"
    assert figures.metric("top1_agreement", 0.5) == "50.00 %"
    assert figures.metric("rmse", 0.25) == "0.2500"
    assert figures.change("accuracy", -0.0171) == "\u22121.71 points"
    assert figures.change("accuracy", 0.0) == "\u00b10.00 points"
    assert figures.change("rmse", 0.25) == "+0.250"
    assert figures.interval("accuracy", (-0.0054, 0.0006)) == "\u22120.54 to +0.06 points"
    assert figures.interval("accuracy", None) == ""


@pytest.mark.parametrize("name", ["perplexity", "mae", "rmse", "loss", "wer"])
def test_other_metrics_are_no_shares(name: str) -> None:
    assert not figures.is_share(name)


def test_ratios_and_decibels() -> None:
    assert figures.times(722_000, 61_200) == "11.8\u00d7"
    assert figures.times(None, 3) == figures.times(3, 0) == "not measured"
    assert figures.decibel(24.31) == "24.3 dB"
    assert figures.decibel(math.inf) == "identical"
    assert figures.decibel(-2.25) == "\u22122.2 dB"


@given(st.floats(min_value=1e-3, max_value=9e6))
def test_a_number_reads_back_within_half_a_per_cent(value: float) -> None:
    assert float(figures.number(value).replace(",", "")) == pytest.approx(value, rel=5.1e-3)


def test_at_stops_at_what_is_no_mapping() -> None:
    assert figures.at({"a": {"b": 0}}, "a", "b") == 0
    assert figures.at({"a": None}, "a", "b") is None
    assert figures.at(None, "a") is None
