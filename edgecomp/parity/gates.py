"""Gates: `top1_agreement >= 0.98`, `drop <= 0.01`, `metric.delta.low >= -0.01`, `size < 2MB`.

    EXPR   = NAME OP NUMBER [UNIT] [on DEVICE]
    NAME   = a key of the parity entry, dots between levels: metric.delta, flips.negative,
             optimized.sqnr_db; then .low or .high for the end of its 95 % interval, or .point
    OP     = >= | > | <= | < | == | !=
    UNIT   = % | dB | B | kB | MB | GB | KiB | MiB | GiB | ms | us
    DEVICE = where a figure of a profile was measured: latency_p50 < 12ms on pi5

`size` is short for `size_bytes`, `latency` for `latency_p50`.
A share or a difference of shares counts as passed only when there are enough samples for a verdict: as many
as a flawless result would need for its interval to exclude the bound. `.point` waives that.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgecomp.errors import InputError, UnknownNameError
from edgecomp.numerics.metrics import Z95

_EXPR = re.compile(
    r"\s*(?P<name>[A-Za-z_][\w.\-/]*)\s*(?P<op>>=|<=|==|!=|>|<)\s*"
    r"(?P<number>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\s*(?P<unit>%|(?!on\s)[A-Za-z]+)?"
    r"(\s+on\s+(?P<device>\S+))?\s*"
)
_OPS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_UNITS = {
    "%": 0.01,
    "dB": 1.0,
    "B": 1.0,
    "kB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "ms": 1.0,
    "us": 1e-3,
}
_SHORT = {"size": "size_bytes", "latency": "latency_p50"}
_ENDS = {"low": 0, "high": 1}


ARTIFACT_FIGURES = (
    "calibration",
    "cosine",
    "devices",
    "distribution",
    "drop",
    "flips",
    "gaps",
    "max_abs_error",
    "metric",
    "optimized",
    "samples",
    "size_bytes",
    "sqnr_db",
    "top1_agreement",
    "worst_corruption",
    "worst_slice",
)
"""First words of everything that a gate of an artifact can name."""
PROFILE_FIGURES = (
    *(f"latency_{name}" for name in ("min", "mean", "p50", "p90", "p95", "p99", "max")),
    "energy_mj",
    "first_ms",
    "init_ms",
    "load_rss_bytes",
    "peak_rss_bytes",
    "throughput_per_s",
)
"""What a gate can name of a profile; latencies in milliseconds."""


@dataclass(frozen=True)
class Gate:
    """One condition. `end`: the end of the interval that is looked at, "point", or "" (point, guarded).

    `device`: the name after `on`, or None.
    """

    expr: str
    name: str
    end: str
    op: str
    bound: float
    device: str | None = None

    @property
    def profiled(self) -> bool:
        """True for a figure of a profile, which is known only once the artifact has run on a device."""
        return self.name in PROFILE_FIGURES

    def check(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """`expr`, `value`, `passed`, `reason` (None when it passed). Raises UnknownNameError, InputError.

        `facts`: the parity entry; `facts["intervals"]` maps names to (low, high); `facts["samples"]`.
        """
        value = self._value(facts)
        if value is None or math.isnan(value):
            return self._result(None, False, f"{self.name} was not measured: it needs targets in the data")
        if not _OPS[self.op](value, self.bound):
            return self._result(
                value, False, f"{self.name} is {value:.6g}; the gate asks {self.op} {self.bound:g}"
            )
        needed = self._samples_needed(facts)
        if needed > facts.get("samples", 0):
            reason = (
                f"{facts.get('samples', 0)} samples are too few for a verdict on {self.expr!r}: "
                f"at least {needed} are needed"
            )
            return self._result(value, False, reason)
        return self._result(value, True, None)

    def _result(self, value: float | None, passed: bool, reason: str | None) -> dict[str, Any]:
        return {"expr": self.expr, "value": value, "passed": passed, "reason": reason}

    def _value(self, facts: Mapping[str, Any]) -> float | None:
        if self.end in _ENDS:
            intervals = facts.get("intervals", {})
            if self.name not in intervals:
                known = [f"{n}.{self.end}" for n in intervals]
                raise UnknownNameError("gate value", f"{self.name}.{self.end}", known)
            ends = intervals[self.name]
            return None if ends is None else float(ends[_ENDS[self.end]])
        return lookup(facts, self.name)

    def _samples_needed(self, facts: Mapping[str, Any]) -> int:
        """Where a flawless result excludes the bound: z^2 (1 - margin) / margin (Wilson, Tango)."""
        if self.end or self.name not in facts.get("shares", ()):
            return 0
        margin = abs(self.bound) if "delta" in self.name or "drop" in self.name else 1 - self.bound
        towards = ("<=", "<") if self.name == "drop" else (">=", ">")
        if self.op not in towards or not 0 < margin < 1:
            return 0
        return math.ceil(Z95 * Z95 * (1 - margin) / margin)


def parse(expr: str) -> Gate:
    """Read one gate. Raises InputError that says what a gate looks like."""
    match = _EXPR.fullmatch(expr)
    if match is None:
        raise InputError(
            f"gate {expr!r} is not understood; expected NAME OP NUMBER, such as 'top1_agreement >= 0.98', "
            "'sqnr_db > 20', 'metric.delta.low >= -0.01' or 'size_bytes < 2MB'"
        )
    unit = match["unit"]
    if unit is not None and unit not in _UNITS:
        raise InputError(f"gate {expr!r} has the unit {unit!r}; expected one of {', '.join(_UNITS)}")
    name, _, end = match["name"].rpartition(".")
    if not name or end not in (*_ENDS, "point"):
        name, end = match["name"], ""
    bound = float(match["number"]) * (_UNITS[unit] if unit else 1.0)
    gate = Gate(expr.strip(), _SHORT.get(name, name), end, match["op"], bound, match["device"])
    if gate.device is not None and not gate.profiled:
        raise InputError(
            f"gate {expr!r} names a device, and {name} is no figure of a profile; expected one of "
            f"{', '.join(PROFILE_FIGURES)}"
        )
    return gate


def parse_all(exprs: Sequence[str]) -> list[Gate]:
    return [parse(e) for e in exprs]


def check_names(exprs: Sequence[str], profiled: bool = False) -> None:
    """Read gates of an artifact before any work; UnknownNameError for a figure that is not to be had.

    `profiled`: the artifact will be profiled too, so that figures of that can be named.
    """
    known = (*ARTIFACT_FIGURES, *PROFILE_FIGURES) if profiled else ARTIFACT_FIGURES
    for gate in parse_all(exprs):
        first = gate.name.split(".")[0]
        if first not in known:
            raise UnknownNameError("gate value", first, known)


def lookup(facts: Mapping[str, Any], name: str) -> float | None:
    """The number at a dotted path. None when a level was not measured. Raises UnknownNameError."""
    value: Any = facts
    for depth, part in enumerate(name.split(".")):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            known = (
                list(numbers(facts))
                if depth == 0 or not isinstance(value, Mapping)
                else [".".join([*name.split(".")[:depth], k]) for k in value]
            )
            raise UnknownNameError("gate value", name, known)
        value = value[part]
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise InputError(f"gate value {name!r} is not a number; name one of {', '.join(numbers(facts))}")
    return float(value)


def numbers(facts: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all numbers (and of what could be one, None) among the facts."""
    found: list[str] = []
    for key, value in facts.items():
        if key in ("intervals", "shares"):
            continue
        if isinstance(value, Mapping):
            found += numbers(value, f"{prefix}{key}.")
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            found.append(prefix + key)
    return found
