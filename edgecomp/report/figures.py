"""Figures as people read them. `None` is shown as "not measured", never as zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MISSING = "not measured"
_MINUS = "\u2212"
# Metrics whose values are shares of one; their differences are shown in points.
_SHARES = ("accuracy", "top1", "top5", "agreement", "recall", "precision", "f1", "auc", "map", "miou")


def at(facts: Any, *keys: str) -> Any:
    """`facts[k1][k2]...`, or None where a key is missing or something on the way is no mapping."""
    for key in keys:
        if not isinstance(facts, Mapping):
            return None
        facts = facts.get(key)
    return facts


def is_share(metric: str) -> bool:
    """True for `accuracy`, `top1_agreement`, `mAP`: values between 0 and 1 that are shown as per cent."""
    words = metric.lower().replace("-", "_").split("_")
    return any(word in _SHARES for word in words)


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent where that stays readable."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return f"{_MINUS if value < 0 else ''}\u221e"
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}".replace("-", _MINUS)
    rounded = abs(float(f"{value:.{digits - 1}e}"))
    places = max(0, digits - 1 - (math.floor(math.log10(rounded)) if rounded else 0))
    return f"{value:,.{places}f}".replace("-", _MINUS)


def scaled(value: float | None, units: tuple[str, ...]) -> str:
    """A size in the first unit that keeps it under 1,000: `scaled(61_200, ("B", "kB"))` is "61.2 kB"."""
    if value is None:
        return MISSING
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value /= 1000
        step += 1
    shown = f"{value:.0f}" if step == 0 else number(value)
    return f"{shown} {units[step]}".strip()


def size(value: float | None) -> str:
    """Bytes in decimal units, as file managers and gates (`size_bytes < 2MB`) count them."""
    return scaled(value, ("B", "kB", "MB", "GB"))


def count(value: float | None) -> str:
    return scaled(value, ("", "k", "M", "G", "T"))


def milliseconds(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{number(value)} ms" if value < 10_000 else f"{number(value / 1000)} s"


def seconds(value: float | None) -> str:
    if value is None:
        return MISSING
    if value < 90:
        return f"{number(value, 2)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def decibel(value: float | None) -> str:
    if value is not None and math.isinf(value) and value > 0:
        return "identical"
    return MISSING if value is None else f"{value:.1f} dB".replace("-", _MINUS)


def metric(name: str, value: float | None) -> str:
    """`metric("accuracy", 0.9012)` is "90.12 %"; other metrics keep their own unit."""
    if value is None:
        return MISSING
    return f"{100 * value:.2f} %" if is_share(name) else number(value, 4)


def change(name: str, value: float | None) -> str:
    """A signed difference; shares in points: -0.012 of accuracy is "-1.20 points"."""
    if value is None:
        return MISSING
    sign = _MINUS if value < 0 else "+" if value > 0 else "\u00b1"
    return f"{sign}{100 * abs(value):.2f} points" if is_share(name) else f"{sign}{number(abs(value))}"


def times(whole: float | None, part: float | None) -> str:
    """How many times `part` goes into `whole`: "11.8\u00d7"."""
    if not whole or not part:
        return MISSING
    return f"{number(whole / part)}\u00d7"


def interval(name: str, ends: Any) -> str:
    """A 95 % interval of a difference; empty when there is none."""
    if not isinstance(ends, (list, tuple)) or len(ends) != 2 or None in ends:
        return ""
    low, high = change(name, ends[0]), change(name, ends[1])
    return f"{low.removesuffix(' points')} to {high}"
