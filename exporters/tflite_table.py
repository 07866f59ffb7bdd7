"""The table of lowerings: ATen overload -> the function that writes its TFLite operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.fx import Node

if TYPE_CHECKING:
    from edgecomp.exporters.tflite_lower import Lowering, Value

Handler = Callable[["Lowering", Node], "Value | list[Value]"]
LOWERINGS: dict[Any, Handler] = {}


class Unsupported(Exception):
    """An operation, or one setting of it, that TFLite cannot express; the message is the reason."""


def lowers(*targets: Any) -> Callable[[Handler], Handler]:
    """Register a function as the lowering of one or more ATen overloads."""

    def register(handler: Handler) -> Handler:
        for target in targets:
            LOWERINGS[target] = handler
        return handler

    return register


def args(node: Node) -> tuple[Any, ...]:
    """A node's positional arguments, untyped as they are."""
    return node.args


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """A node's argument by position or by name."""
    if index < len(node.args):
        return node.args[index]
    return node.kwargs.get(name, default)


def pair(setting: Any) -> tuple[int, int]:
    """3 or [3] or [3, 5] -> (3, 3), (3, 3), (3, 5)."""
    if isinstance(setting, int):
        return setting, setting
    values = list(setting)
    return (int(values[0]), int(values[-1]))
