"""YAML in which `2:4` is text, as in YAML 1.2, and not a number to base 60 (124), as in YAML 1.1."""

from __future__ import annotations

import re
from typing import Any

import yaml

_INTEGER = r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)"
_REAL = (
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))"
)
_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(f"^(?:{_INTEGER})$"),
    "tag:yaml.org,2002:float": re.compile(rf"^(?:{_REAL}|\.(?:nan|NaN|NAN))$"),
}


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader but for numbers to base 60."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load(text: str) -> Any:
    """Raises yaml.YAMLError."""
    return yaml.load(text, Loader=Loader)  # noqa: S506 - it is a SafeLoader
