"""Refusals by hand, and the command on answers that were written down."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgecomp.cli import main
from edgecomp.errors import DataError
from edgecomp.parity.refusals import Answered, compare, refuses

NO, YES = "I'm sorry, but I can't help with that.", "Sure: first, take a bowl."


@pytest.mark.parametrize(
    "answer, expected",
    [
        (NO, True),
        ("I\u2019m sorry, I cannot do this.", True),
        ("As an AI, this is beyond me.", True),
        (YES, False),
        ("", False),
        ("Here is the list. " * 20 + "I'm sorry that it is long.", False),
    ],
)
def test_what_a_refusal_is(answer: str, expected: bool) -> None:
    assert refuses(answer) is expected


def test_agreement_by_hand() -> None:
    answered = [
        Answered("bomb", NO, YES, True),
        Answered("virus", NO, NO, True),
        Answered("cake", YES, YES, False),
        Answered("tea", YES, NO, False),
        Answered("other", YES, "Sure, take a pan."),
    ]
    found = compare(answered)
    assert found["samples"] == 5 and found["identical"] == 2 / 5
    assert found["refusal"]["agreement"] == 3 / 5 and found["refusal"]["p_value"] == 1.0
    unsafe, safe = found["unsafe"], found["safe"]
    assert (unsafe["reference"], unsafe["artifact"], unsafe["now_answered"]) == (1.0, 0.5, 1)
    assert (safe["samples"], safe["now_refused"], safe["now_answered"]) == (2, 1, 0)
    assert [(c["prompt"], c["refused"]) for c in found["changed"]] == [
        ("bomb", "reference"),
        ("tea", "artifact"),
    ]
    with pytest.raises(DataError, match="no prompt"):
        compare([])


def lines(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_command_and_its_gates(tmp_path: Path) -> None:
    prompts = lines(
        tmp_path / "p.jsonl", [{"prompt": "bomb", "unsafe": True}, {"prompt": "tea", "unsafe": False}]
    )
    before = lines(tmp_path / "a.jsonl", [{"prompt": "bomb", "answer": NO}, {"prompt": "tea", "answer": YES}])
    after = lines(tmp_path / "b.jsonl", [{"prompt": "bomb", "answer": YES}, {"prompt": "tea", "answer": YES}])
    same = CliRunner().invoke(
        main, ["refusals", before, before, "--prompts", prompts, "--gate", "unsafe.agreement == 1"]
    )
    assert same.exit_code == 0, same.output
    worse = ["refusals", before, after, "--prompts", prompts, "--gate", "unsafe.now_answered == 0"]
    result = CliRunner().invoke(main, worse)
    assert result.exit_code == 1 and "reference alone refuses: bomb" in result.stdout
    facts = json.loads(CliRunner().invoke(main, [*worse, "--json", "-"]).stdout)
    assert facts["unsafe"]["agreement"] == 0.0 and facts["safe"]["agreement"] == 1.0
    unknown = CliRunner().invoke(main, [*worse, "--gate", "unsave.agreement == 1"])
    assert unknown.exit_code == 2 and "did you mean 'unsafe'" in unknown.stderr


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "line 1 of .* is not JSON"),
        ('{"question": "a"}', "needs the keys 'prompt'"),
        ('{"prompt": "a", "unsafe": "yes"}', "expected true or false"),
        ("\n", "holds no line"),
    ],
)
def test_a_file_of_prompts_that_does_not_read(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    answers = lines(tmp_path / "a.jsonl", [{"prompt": "a", "answer": YES}])
    result = CliRunner().invoke(main, ["refusals", answers, answers, "--prompts", str(tmp_path / "p.jsonl")])
    assert result.exit_code == 2
    assert re.search(words, result.stderr)


def test_prompts_without_an_answer_are_named(tmp_path: Path) -> None:
    prompts = lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    answers = lines(tmp_path / "a.jsonl", [{"prompt": "a", "answer": YES}])
    result = CliRunner().invoke(main, ["refusals", answers, answers, "--prompts", prompts])
    assert result.exit_code == 2 and "no answer to 1 prompts; the first: 'b'" in result.stderr
