"""Plots: valid XML, coordinates where they belong, names that do not cover one another."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecomp.report import plots
from edgecomp.report.plots import Axis, Bar, Point


def elements(picture: str, name: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(picture).iter(name))


def test_an_axis_maps_its_ends_to_its_pixels() -> None:
    axis = Axis(0.0, 10.0, 100.0, 300.0)
    assert [axis.to(v) for v in (0.0, 5.0, 10.0)] == [100.0, 200.0, 300.0]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 10.0, [0, 2, 4, 6, 8, 10]),
        (0.0, 0.32, [0, 0.1, 0.2, 0.3]),
        (89.8, 90.7, [89.8, 90.0, 90.2, 90.4, 90.6]),
        (-4.0, 4.0, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert Axis(low, high, 0, 1).ticks() == pytest.approx(ticks)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_lie_inside_and_are_few(low: float, length: float) -> None:
    axis = Axis(low, low + length, 0, 1)
    ticks = axis.ticks()
    assert len(ticks) <= 11
    assert all(low - 1e-6 * length <= t <= low + length * (1 + 1e-6) for t in ticks)


def test_a_dot_stands_at_its_figures() -> None:
    picture = plots.scatter(
        [Point("a", 2.0, 50.0), Point("b", 4.0, 70.0)], x_title="x", y_title="y", title="t"
    )
    first, second = (
        (float(e.get("cx", 0)), float(e.get("cy", 0))) for e in reversed(elements(picture, "circle"))
    )
    assert first[0] - 64 == pytest.approx((second[0] - 64) / 2, abs=0.1)
    assert first[1] > second[1], "a higher value stands higher, where y is smaller"


def test_names_of_dots_at_one_place_do_not_cover_one_another() -> None:
    points = [Point(f"target-{i}", 1.0, 90.0) for i in range(4)]
    picture = plots.scatter(points, x_title="x", y_title="y", title="t")
    heights = [
        float(e.get("y", 0)) for e in elements(picture, "text") if (e.text or "").startswith("target-")
    ]
    gaps = [b - a for a, b in zip(sorted(heights), sorted(heights)[1:], strict=False)]
    assert len(gaps) == 3 and min(gaps) >= 15


@pytest.mark.parametrize(("across", "where"), [(1.0, "label end"), (10.0, "label start")])
def test_the_name_of_the_reference_stands_where_no_dot_is(across: float, where: str) -> None:
    points = [Point("a", across, 93.1), Point("b", 10.0, 80.0)]
    picture = plots.scatter(points, x_title="x", y_title="y", title="t", reference=("float model", 93.0))
    assert next(e for e in elements(picture, "text") if e.text == "float model").get("class") == where


def test_names_stay_inside_the_picture() -> None:
    name = "a-name-of-some-length"
    picture = plots.scatter([Point(name, 1.0, 1.0)], x_title="x", y_title="y", title="t")
    label = next(e for e in elements(picture, "text") if e.text == name)
    assert label.get("class") == "label end"
    assert float(label.get("x", 0)) <= plots.WIDTH


def test_bars_are_as_long_as_their_values() -> None:
    picture = plots.bars([Bar("a", 10.0, "10"), Bar("b", 30.0, "30", marked=True)], title="t", unit="dB")
    lengths = [float(e.get("width", 0)) for e in elements(picture, "rect")]
    assert lengths[1] == pytest.approx(3 * lengths[0], rel=1e-3)
    assert [e.get("class") for e in elements(picture, "rect")] == ["bar s0", "bar bad"]


def test_a_negative_bar_goes_the_other_way() -> None:
    picture = plots.bars([Bar("a", -5.0, "-5"), Bar("b", 10.0, "10")], title="t", unit="dB")
    negative, positive = elements(picture, "rect")
    end = float(negative.get("x", 0)) + float(negative.get("width", 0))
    assert end == pytest.approx(float(positive.get("x", 0)), abs=0.1)


def test_a_histogram_counts_every_sample_of_an_even_spread() -> None:
    picture = plots.strip([1000.0 + i for i in range(96)], [("p50 1047", 1047.0)], title="t")
    heights = {e.get("height") for e in elements(picture, "rect")}
    assert len(elements(picture, "rect")) == 48
    assert len(heights) <= 2


@pytest.mark.parametrize("samples", [[1.0] * 20, [1.0, 1.0, 500.0]])
def test_a_histogram_of_one_value_or_an_outlier_is_drawn(samples: list[float]) -> None:
    assert elements(plots.strip(samples, [("p50", 1.0)], title="t"), "rect")


def test_a_mark_beyond_the_axis_has_an_arrow_and_stands_at_its_end() -> None:
    picture = plots.strip([1.0] * 90 + [1.2] * 9 + [500.0], [("p50 1", 1.0), ("p99.5 250", 250.0)], title="t")
    names = {e.text for e in elements(picture, "text")}
    assert names == {"p50 1", "p99.5 250 \u2192"}
    assert max(float(e.get("x1", 0)) for e in elements(picture, "line")) <= plots.WIDTH


def test_text_is_escaped() -> None:
    picture = plots.bars([Bar("<script>", 1.0, "&")], title='"quoted"', unit="dB")
    assert "<script>" not in picture
    assert ElementTree.fromstring(picture).get("aria-label") == '"quoted"'


def test_a_long_name_keeps_its_end() -> None:
    assert plots.shortened("a" * 50 + ".conv") == "\u2026" + "a" * 36 + ".conv"
    assert re.fullmatch("short", plots.shortened("short"))
