"""Gate expressions: reading, units, interval ends, and the refusal of too few samples."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecomp.errors import InputError, UnknownNameError
from edgecomp.parity import gates

FACTS = {
    "samples": 1000,
    "top1_agreement": 0.985,
    "sqnr_db": math.inf,
    "size_bytes": 1_500_000,
    "metric": {"name": "accuracy", "delta": -0.004},
    "flips": {"negative": 4, "positive": 0},
    "optimized": None,
    "intervals": {"top1_agreement": (0.975, 0.991), "metric.delta": (-0.009, 0.001)},
    "shares": ["top1_agreement", "metric.delta"],
}


@pytest.mark.parametrize(
    "expr, value, passed",
    [
        ("top1_agreement >= 0.98", 0.985, True),
        ("top1_agreement>=98%", 0.985, True),
        ("top1_agreement.low >= 0.98", 0.975, False),
        ("top1_agreement.high >= 0.98", 0.991, True),
        ("metric.delta >= -0.01", -0.004, True),
        ("metric.delta > -4e-3", -0.004, False),
        ("metric.delta.low >= -1%", -0.009, True),
        ("sqnr_db > 20dB", math.inf, True),
        ("size_bytes < 2MB", 1.5e6, True),
        ("size_bytes < 1.4 MiB", 1.5e6, False),
        ("flips.negative == 4", 4, True),
        ("flips.positive != 0", 0, False),
        ("flips.negative <= .5e1", 4, True),
        ("optimized.sqnr_db > 3", None, False),
    ],
)
def test_checked(expr, value, passed):
    result = gates.parse(expr).check(FACTS)
    assert (result["expr"], result["value"], result["passed"]) == (expr, value, passed)
    assert (result["reason"] is None) is passed


@pytest.mark.parametrize(
    "expr",
    ["", "accuracy", "top1 > ", "> 3", "a > b", "a >> 3", "a > 3 > 2", "__import__('os') > 1", "a > 1_0"],
)
def test_unreadable(expr):
    with pytest.raises(InputError, match="expected NAME OP NUMBER"):
        gates.parse(expr)


def test_unknown_unit():
    with pytest.raises(InputError, match="unit 'XB'"):
        gates.parse("size_bytes < 2 XB")


@pytest.mark.parametrize(
    "expr, hint",
    [
        ("sqnr > 3", "sqnr_db"),
        ("metric.dleta > 0", "metric.delta"),
        ("metric.deltas.low > 0", "metric.delta.low"),
    ],
)
def test_unknown_name_offers_the_nearest(expr, hint):
    with pytest.raises(UnknownNameError, match=hint):
        gates.parse(expr).check(FACTS)


def test_text_is_no_value():
    with pytest.raises(InputError, match="not a number"):
        gates.parse("metric.name > 3").check(FACTS)


@pytest.mark.parametrize(
    "expr, needed",
    # z^2 (1 - m) / m with z^2 = 3.8415: 0.02 -> 188.2, 0.01 -> 380.3
    [("top1_agreement >= 0.98", 189), ("metric.delta >= -0.01", 381)],
)
def test_too_few_samples_do_not_pass(expr, needed):
    facts = FACTS | {"top1_agreement": 1.0, "metric": {"delta": 0.0}}
    assert gates.parse(expr).check(facts | {"samples": needed})["passed"]
    refused = gates.parse(expr).check(facts | {"samples": needed - 1})
    assert not refused["passed"]
    assert f"at least {needed} are needed" in refused["reason"]
    name, op, number = expr.split()
    assert gates.parse(f"{name}.point {op} {number}").check(facts | {"samples": 3})["passed"]


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([">=", ">", "<=", "<", "==", "!="]))
def test_any_number_is_read_back(bound, op):
    gate = gates.parse(f"metric.delta {op} {bound!r}")
    assert gate.bound == bound and gate.op == op


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        gate = gates.parse(text)
    except InputError:
        return
    assert math.isfinite(gate.bound) or "e" in text.lower()


def test_an_unknown_figure_is_refused_before_any_work() -> None:
    gates.check_names(["top1_agreement >= 0.9", "metric.delta.low >= -0.01", "gaps.class.change <= 0.02"])
    with pytest.raises(
        UnknownNameError, match="unknown gate value 'top1_agrement'; did you mean 'top1_agreement'"
    ):
        gates.check_names(["sqnr_db > 10", "top1_agrement >= 0.9"])


def test_every_figure_of_an_entry_can_be_named() -> None:
    """The list before the work and the entry after it do not drift apart."""
    assert {n.split(".")[0] for n in gates.numbers(FACTS)} <= set(gates.ARTIFACT_FIGURES)
