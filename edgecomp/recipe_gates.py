"""How gates are written in a recipe: strings, `max_drop: 0.01`, and figures of a profile by device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from edgecomp.errors import RecipeError
from edgecomp.parity import gates as gating


def plain(value: Any) -> Any:
    """`max_drop: 0.01`, alone or as one entry of a list, is `drop <= 0.01`."""
    entries = [value] if isinstance(value, dict) else value
    if not isinstance(entries, list | tuple):
        return value
    return [f"drop <= {e['max_drop']!r}" if _is_drop(e) else e for e in entries]


def _is_drop(entry: Any) -> bool:
    return (
        isinstance(entry, dict) and list(entry) == ["max_drop"] and isinstance(entry["max_drop"], int | float)
    )


_Drop = dict[Literal["max_drop"], float]
Gates = Annotated[
    tuple[str, ...],
    BeforeValidator(plain, json_schema_input_type=list[str | _Drop] | _Drop),
    Field(description="Conditions such as max_drop: 0.01, 'size < 2MB', 'latency_p50 < 12ms on pi5'"),
]


def by_target(gates: Mapping[str, Any]) -> dict[str, Any]:
    """`max_drop` beside the targets holds for all of them."""
    if "max_drop" not in gates:
        return dict(gates)
    rest = {k: v for k, v in gates.items() if k != "max_drop"}
    known = rest.get("all", [])
    rest["all"] = [{"max_drop": gates["max_drop"]}, *(known if isinstance(known, list | tuple) else [known])]
    return rest


def for_editors(schema: dict[str, Any]) -> None:
    """Let the schema of a recipe's `gates` take `max_drop` beside the targets, in place."""
    for choice in schema["anyOf"]:
        if isinstance(choice.get("additionalProperties"), dict) and "propertyNames" not in choice:
            choice["properties"] = {"max_drop": {"type": "number"}}


def check_devices(
    artifacts: Sequence[str], steps: Sequence[str], devices: Sequence[str], exports: bool
) -> None:
    """Gates on a profile need a device that the recipe profiles on, and those of a step an export to measure.

    Raises RecipeError.
    """
    of_steps = [g for g in gating.parse_all(steps) if g.profiled]
    if of_steps and not exports:
        raise RecipeError(
            f"gate {of_steps[0].expr!r} of a step needs a file to measure, and the recipe exports none; name "
            "its target under exports"
        )
    for gate in [*of_steps, *(g for g in gating.parse_all(artifacts) if g.profiled)]:
        if not devices or (gate.device is not None and gate.device not in devices):
            raise RecipeError(
                f"gate {gate.expr!r} needs a profile on {gate.device or 'a device'}; the recipe profiles on "
                f"{', '.join(devices) or 'none'}: name it under profile.devices"
            )
