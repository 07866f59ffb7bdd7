"""The page: self-contained, complete, honest about what was not measured."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp import report
from edgecomp.errors import OutputError
from edgecomp.report import page
from edgecomp.report.view import verdict, view, warnings

_VOID = {"meta", "line", "circle", "rect"}


class Reader(HTMLParser):
    """Checks that every tag is closed, and collects text and attributes that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [
            f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "xlink:href")
        ]
        if tag in ("script", "link", "iframe", "img", "object"):
            self.loads.append(tag)
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_loads_nothing(ledger: dict[str, Any]) -> None:
    text = page.html(ledger)
    assert read(text).loads == []
    assert "url(" not in text and "@import" not in text
    assert "http:" not in text and "https:" not in text


def test_both_files_are_written_and_nothing_else(ledger: dict[str, Any], tmp_path: Path) -> None:
    assert report.write(ledger, tmp_path / "out") == tmp_path / "out" / "report.html"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.html", "report.md"}


def test_a_folder_that_cannot_be_written_is_named(ledger: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="report.html"):
        report.write(ledger, tmp_path / "file")


@pytest.mark.parametrize("render", [page.html, page.markdown])
def test_the_facts_are_there(ledger: dict[str, Any], render: Any) -> None:
    text = render(ledger)
    for fact in (
        "Fashion-MNIST demo",
        "coreml-pal4",
        "41.8 kB",
        "17.3\u00d7 smaller",
        "\u22121.71 points",
        "24.3 dB",
        "98.50 %",
        "10 outputs do not divide by group 16",
        "the governor is unknown",
        "torch 2.13.0",
        "ratio: 0.5",
        "0123456789ab",
        "12.3 M",
        "not measured",
    ):
        assert fact in text, fact


def test_a_device_where_nothing_was_measured_says_why(ledger: dict[str, Any]) -> None:
    profile = view(ledger).details[3].profiles[0]
    assert profile.figures is None
    assert profile.warnings == ("the governor is unknown: the clock may change during the run",)


def test_the_notes_of_a_step_are_told(ledger: dict[str, Any]) -> None:
    ledger["steps"][1]["notes"] = ["head not pruned: an output of the model"]
    assert "head not pruned" in read(page.html(ledger)).text
    assert "- prune: head not pruned" in page.markdown(ledger)


def test_the_verdict_stands_before_everything_else(ledger: dict[str, Any]) -> None:
    text = read(page.html(ledger)).text
    assert text.index("Failed") < text.index("Artifacts")
    assert "coreml-pal4: sqnr_db is 14.2; the gate asks > 20" in text


def test_the_verdict_follows_the_gates(ledger: dict[str, Any]) -> None:
    assert verdict(ledger).passed is False
    ledger["artifacts"].pop()
    assert verdict(ledger).passed is True
    assert verdict(ledger).text == "All 6 gates hold."
    for artifact in ledger["artifacts"]:
        artifact["parity"]["gates"] = []
    assert verdict(ledger).passed is None


def test_a_step_that_broke_its_gate_fails_the_run(ledger: dict[str, Any]) -> None:
    ledger["artifacts"].pop()
    ledger["steps"][1]["passed"] = False
    assert verdict(ledger).passed is False
    assert "prune" in verdict(ledger).text


def test_the_ledgers_own_words_are_used(ledger: dict[str, Any]) -> None:
    ledger["verdict"] = {"passed": False, "text": "The run was stopped."}
    assert verdict(ledger).text == "The run was stopped."


def test_a_warning_of_several_artifacts_is_told_once(ledger: dict[str, Any]) -> None:
    (line,) = warnings(ledger)
    assert line.startswith("tflite-int8 on local, onnx-qdq on local")


def test_an_artifact_without_latency_is_named_below_the_picture(ledger: dict[str, Any]) -> None:
    shown = view(ledger)
    assert shown.trade is not None
    assert shown.trade_lacks == ("coreml-pal4",)
    assert shown.trade.count("<circle") == 3


def test_what_a_ledger_says_is_text_and_not_markup(ledger: dict[str, Any]) -> None:
    ledger["recipe"]["name"] = "<script>alert(1)</script>"
    ledger["steps"][0]["name"] = "<b>bold</b>"
    ledger["artifacts"][0]["parity"]["layers"][0]["module"] = "</svg><img src=x>"
    assert read(page.html(ledger)).loads == []


def test_a_table_of_markdown_keeps_its_columns(ledger: dict[str, Any]) -> None:
    ledger["artifacts"][3]["manifest"]["skipped"][0]["reason"] = "a | b\nc"
    text = page.markdown(ledger)
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1, block
    assert "a \\| b c" in text


def test_many_layers_are_cut_to_the_lowest(ledger: dict[str, Any]) -> None:
    parity = ledger["artifacts"][0]["parity"]
    parity["layers"] = [
        {"name": f"n{i}", "module": f"layer{i}.", "sqnr_db": float(i), "kind": "a"} for i in range(90)
    ]
    chart = view(ledger).layers[0]
    assert chart.picture is not None
    assert "layer39." in chart.picture and "layer40." not in chart.picture
    assert "40 lowest of 90 layers" in chart.note


def test_artifacts_of_one_plan_share_a_picture_of_their_layers(ledger: dict[str, Any]) -> None:
    charts = view(ledger).layers
    assert [c.names for c in charts] == [("tflite-int8", "onnx-qdq", "coreml-pal4"), ("tflite-fp32",)]
    assert charts[0].picture is not None and charts[1].picture is None


def test_a_step_that_was_rolled_back_is_shown_and_fails_nothing(ledger: dict[str, Any]) -> None:
    ledger["artifacts"].pop()
    gate = {"expr": "drop <= 0.001", "value": 0.01, "passed": False, "reason": "drop is 0.01"}
    ledger["steps"][1] |= {"passed": False, "rolled_back": True, "gates": [gate]}
    assert verdict(ledger).passed is True
    assert "rolled back" in read(page.html(ledger)).text


def test_an_empty_ledger_makes_a_page() -> None:
    text = read(page.html({})).text
    assert "No artifact was exported." in text
    assert page.markdown({})


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [here] if here else []
    for key, item in items:
        if key != "samples" or isinstance(item, int):
            found += paths(item, (*here, key))
    return found


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_key_may_be_null_or_missing(data: st.DataObject) -> None:
    facts = copy.deepcopy(_FULL)
    for _ in range(data.draw(st.integers(1, 6))):
        *way, last = data.draw(st.sampled_from([p for p in paths(facts) if p]))
        place: Any = facts
        for key in way:
            place = place[key]
        if isinstance(place, dict) and data.draw(st.booleans()):
            del place[last]
        elif isinstance(place, dict):
            place[last] = None
    read(page.html(facts))
    page.markdown(facts)


_FULL: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _shared(ledger: dict[str, Any]) -> None:
    _FULL.clear()
    _FULL.update(ledger)
